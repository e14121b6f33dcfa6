"""The models on the GPU, in bfloat16: as near to the float32 eager model as eager attention in bfloat16 is.

What is decided on the host (which masks become ranges, which modules are patched, what falls back) is tested on the
CPU; here the kernels meet the tensors, masks and caches that the models really hand over.
"""

import copy

import pytest
import torch
from tiny_models import TINY

import hf_flash

pytestmark = pytest.mark.gpu
ENCODERS = ["albert", "bert", "distilbert"]
LENGTHS = (5, 1, 7)


@pytest.fixture
def models(tiny):
    """models(name, **config) -> the float32 eager model, the same in bfloat16, and the latter with hf_flash.

    The weights are bfloat16's in all three, so that what differs is computation.
    """

    def make(name, padding_free=False, **config):
        half = tiny.make(name, device="cuda", dtype=torch.bfloat16, **config)
        ours = hf_flash.patch_model(
            copy.deepcopy(half), on_unsupported="error", on_fallback="error", padding_free=padding_free
        )
        return copy.deepcopy(half).float(), half, ours

    return make


def assert_as_near(want, own, ours, floor=2**-7):
    """Every tensor of ours is at most three times as far from want as own is, or by ``floor`` of the largest size.

    Distances are Frobenius norms: single elements of such small models are a matter of luck. The floor is for gradients
    that vanish in exact arithmetic, as a key bias's does.
    """
    largest = max(t.float().norm().item() for t in want.values())
    for name, exact in want.items():
        error, allowed = ((t[name].float() - exact.float()).norm().item() for t in (ours, own))
        assert error <= 3 * allowed + floor * largest, f"{name}: {error:.2e}, eager has {allowed:.2e}"


def step(tiny, model, inputs):
    """Loss, logits at valid places and every gradient, by name."""
    logits, loss, gradients = tiny.step(model, inputs)
    return {"logits": logits, "loss": loss}, gradients


def assert_same_step(tiny, models, inputs):
    (want, grads), (own, own_grads), (got, our_grads) = (step(tiny, model, inputs) for model in models)
    assert_as_near(want, own, got)
    assert grads.keys() == our_grads.keys()
    assert_as_near(grads, own_grads, our_grads)
    assert hf_flash.explain(models[2]).share == 1.0


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_step(tiny, models, name, padding):
    trio = models(name)
    for model in trio:
        model.train()
    assert_same_step(tiny, trio, tiny.batch(name, padding, device="cuda", length=29))


@pytest.mark.parametrize("padding", ["right", "holes"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "t5"])
def test_a_step_reads_nothing_back(tiny, models, name, padding):
    """The host runs ahead of the GPU from step to step: where it waited for a mask, the GPU would then wait for it."""
    model = models(name)[2].train()
    inputs = tiny.batch(name, padding, device="cuda", length=29)
    model(**inputs).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@pytest.mark.parametrize("name", ENCODERS)
def test_padding_free(tiny, models, name, padding):
    assert_same_step(tiny, models(name, padding_free=True), tiny.batch(name, padding, device="cuda", length=29))


@pytest.mark.parametrize("keywords", [False, True], ids=["positions", "keywords"])
@pytest.mark.parametrize("name", ["albert", "bert", "distilbert", "electra", "gpt2", "llama", "roberta"])
def test_packed_equals_separate(models, name, keywords):
    exact, half, ours = models(name)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 61, (1, length), generator=generator).cuda() for length in LENGTHS]
    places = [torch.arange(length, device="cuda")[None] for length in LENGTHS]
    packed = {"input_ids": torch.cat(rows, 1), "position_ids": torch.cat(places, 1)}
    if keywords:
        starts = torch.tensor([0, 5, 6, 13], dtype=torch.int32, device="cuda")
        packed |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
    logits = {
        model: torch.cat([model(input_ids=i, position_ids=p).logits for i, p in zip(rows, places, strict=True)], 1)
        for model in (exact, half)
    }
    logits[ours] = ours(**packed).logits
    weights = torch.randn(logits[exact].shape, generator=torch.Generator().manual_seed(5)).cuda()
    gradients = {}
    for model, found in logits.items():
        (found.float() * weights).sum().backward()
        gradients[model] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_as_near(*({"logits": logits[model].detach()} for model in (exact, half, ours)))
    assert_as_near(*(gradients[model] for model in (exact, half, ours)))
    assert hf_flash.explain(ours).share == 1.0


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_continues(tiny, models, name, padding):
    """Eight tokens, then five more, then one: causal from the bottom right, left padding in the cache."""
    inputs = tiny.batch(name, padding, device="cuda", length=14)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    found = []
    for model in models(name):
        cache, parts = None, []
        with torch.no_grad():
            for begin, end in ((0, 8), (8, 13), (13, 14)):
                more = {} if cache is None else {"past_key_values": cache}
                out = model(ids[:, begin:end], attention_mask=mask[:, :end], use_cache=True, **more)
                cache = out.past_key_values
                parts.append(out.logits)
        found.append({"logits": torch.cat(parts, 1)[mask.bool()]})
    assert_as_near(*found)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["bart", "gpt2", "t5"])
def test_generation_runs_on_our_kernel(tiny, models, name, cache):
    """Tokens may differ where two logits almost tie; the share tells who computed them."""
    _, _, ours = models(name)
    inputs = {k: v for k, v in tiny.batch(name, "left", device="cuda").items() if k in ("input_ids", "attention_mask")}
    how = {"cache_implementation": "static"} if cache == "static" else {}
    assert ours.generate(**inputs, max_new_tokens=5, do_sample=False, **how).shape[0] == 3
    assert hf_flash.explain(ours).share == 1.0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_gradient_checkpointing_replays_dropout(tiny, models, name, reentrant):
    _, _, model = models(name, **{tiny.models[name].attention_dropout: 0.3})
    model.train()
    inputs = tiny.batch(name, device="cuda") | ({} if name == "bert" else {"use_cache": False})
    torch.manual_seed(0)
    want = step(tiny, model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(0)
    got = step(tiny, model, inputs)
    assert torch.equal(want[0]["logits"], got[0]["logits"])
    for name, gradient in want[1].items():  # atomic additions of dq may round differently
        torch.testing.assert_close(got[1][name], gradient, rtol=5e-2, atol=1e-2 * gradient.abs().max().item() + 1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_float32_without_autocast_falls_back_and_says_so(tiny, name):
    model = hf_flash.patch_model(tiny.make(name, device="cuda"), on_fallback="ignore")
    inputs = tiny.batch(name, device="cuda")
    model(**inputs)
    assert hf_flash.explain(model).reasons().keys() == {"FP32"}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = hf_flash.patch_model(tiny.make(name, device="cuda"), on_fallback="error")
        ours(**inputs).loss.backward()
    assert hf_flash.explain(ours).share == 1.0


@pytest.mark.architectures("default")
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_fullgraph_compile(tiny, models, name):
    _, _, model = models(name)
    inputs = {k: v for k, v in tiny.batch(name, device="cuda").items() if k != "labels"}
    inputs |= {} if name == "bert" else {"use_cache": False}
    valid = inputs["attention_mask"].bool()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want, got = model(**inputs).logits[valid], compiled(**inputs).logits[valid]
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    got.float().square().sum().backward()
