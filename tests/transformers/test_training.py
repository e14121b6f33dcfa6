"""What training adds: dropout, gradient checkpointing, padding-free encoders, torch.compile."""

import copy

import accelerate.hooks
import pytest
import torch
import transformers
from tiny_models import TINY

import hf_flash

ENCODERS = sorted(name for name, model in TINY.items() if model.kind == "encoder")  # all drop padding so far


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", sorted(TINY.keys() - {"albert"}))  # which knows no checkpointing
def test_gradient_checkpointing_replays_dropout(tiny, name, reentrant):
    """Both modes give the gradients of a step without checkpointing, attention dropout included."""
    model = tiny.twin(tiny.make(name, **{tiny.models[name].attention_dropout: 0.3})).train()
    inputs = tiny.batch(name) | ({} if tiny.models[name].kind == "encoder" else {"use_cache": False})
    torch.manual_seed(0)
    want = tiny.step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(0)
    got = tiny.step(model, inputs)
    assert torch.equal(want[0], got[0])
    for parameter, grad in want[2].items():
        assert (grad - got[2][parameter]).abs().max() <= 1e-5 * max(1, grad.abs().max()), parameter


@pytest.mark.parametrize("name", sorted(TINY))
def test_dropout_follows_the_seed_and_the_mode(tiny, name):
    model = tiny.twin(tiny.make(name, **{tiny.models[name].attention_dropout: 0.3}))
    plain = tiny.twin(tiny.make(name))
    inputs = tiny.batch(name)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)  # eval: no dropout
    model.train()
    torch.manual_seed(1)
    first = tiny.step(model, inputs)
    torch.manual_seed(1)
    second = tiny.step(model, inputs)
    torch.manual_seed(2)
    third = tiny.step(model, inputs)
    assert torch.equal(first[0], second[0]) and all(torch.equal(first[2][n], second[2][n]) for n in first[2])
    assert not torch.equal(first[0], third[0])


def test_dropout_keeps_the_mean(tiny):
    """The mean of many draws of one attention module's output is its output without dropout."""
    module = tiny.twin(tiny.make("bert", attention_probs_dropout_prob=0.3)).bert.encoder.layer[0].attention.self
    states = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = module.eval()(states)[0]
        module.train()
        torch.manual_seed(0)
        draws = torch.stack([module(states)[0] for _ in range(600)])
    assert (draws[0] - want).abs().max() > 0.01
    standard_error = draws.std(0) / 600**0.5
    assert ((draws.mean(0) - want).abs() <= 5 * standard_error + 0.005 * want.abs().max()).all()


def shapes_of_queries(model) -> set:
    """Fills with (batch, tokens) of what the query projections of an encoder get."""
    shapes = set()
    for child, module in model.named_modules():
        if child.endswith(("query", "q_lin")):
            module.register_forward_hook(lambda m, args, out: shapes.add(tuple(args[0].shape[:2])))
    return shapes


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", ENCODERS)
def test_padding_free(tiny, name, padding):
    """Logits and gradients stay; the stack of layers sees the real tokens alone."""
    eager = tiny.make(name)
    model = hf_flash.patch_model(copy.deepcopy(eager), padding_free=True, on_fallback="error", on_unsupported="error")
    shapes = shapes_of_queries(model)
    inputs = tiny.batch(name, padding)
    tiny.assert_same_step(eager, model, inputs, tolerance=1e-6 if padding == "none" else 5e-6)
    tokens = 39 if padding == "none" else int(inputs["attention_mask"].sum())
    assert shapes == ({(3, 13)} if padding == "none" else {(1, tokens)})
    assert hf_flash.explain(model).share == 1.0


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_free_of_nothing_but_padding(tiny, name):
    model, plain = hf_flash.patch_model(tiny.make(name), padding_free=True), tiny.twin(tiny.make(name))
    inputs = tiny.batch(name) | {"attention_mask": torch.zeros(3, 13, dtype=torch.long)}
    tiny.assert_same_step(plain, model, inputs)


@pytest.mark.parametrize("name", ["albert", "bert", "distilbert"])
def test_padding_free_steps_aside(tiny, name, monkeypatch):
    """Each layer's states asked for, or no kernel: the padded way, with the same results."""
    eager = tiny.make(name)
    model = hf_flash.patch_model(copy.deepcopy(eager), padding_free=True)
    inputs = tiny.batch(name)
    valid = inputs["attention_mask"].bool()
    want = eager(**inputs, output_hidden_states=True)
    got = model(**inputs, output_hidden_states=True)
    for a, b in zip(want.hidden_states, got.hidden_states, strict=True):
        assert a.shape == b.shape and (a - b)[valid].abs().max() < 1e-4
    monkeypatch.setattr("hf_flash.support.device_reason", lambda *a: ("NO_KERNEL", "none in this test"))
    assert (model(**inputs).logits - want.logits)[valid].abs().max() < 1e-4


@pytest.mark.parametrize("arguments", [{"fp32": "bfloat16"}, {"fp32": "fallback"}, {"exclude": "*layer.0*"}])
def test_padding_free_where_every_layer_is_served(tiny, monkeypatch, arguments):
    """In the dtype to attend in, which fp32 names; not where a layer would attend to all tokens at once elsewhere."""
    narrow = ("FP32", "none in this test")
    monkeypatch.setattr("hf_flash.support.device_reason", lambda *a: narrow if a[-1] == torch.float32 else None)
    model = hf_flash.patch_model(tiny.make("bert"), padding_free=True, on_fallback="ignore", **arguments)
    shapes = shapes_of_queries(model)
    inputs = tiny.batch("bert")
    model(**inputs)
    tokens = (1, int(inputs["attention_mask"].sum()))
    assert shapes == {tokens if arguments == {"fp32": "bfloat16"} else (3, 13)}


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_padding_free_in_vain(tiny, name, caplog):
    """No encoder that could drop padding: never in silence."""
    model = tiny.make(name)
    with pytest.raises(NotImplementedError, match=r"\[PADDING_FREE\].*leave padding_free out"):
        hf_flash.patch_model(model, padding_free=True, on_unsupported="error")
    assert not hf_flash.is_patched(model)
    hf_flash.patch_model(model, padding_free=True)
    hf_flash.patch_model(model, padding_free=True)
    assert caplog.text.count("[PADDING_FREE]") == 1 and hf_flash.is_patched(model)


def test_padding_free_without_a_layer(tiny, caplog, monkeypatch):
    hf_flash.patch_model(tiny.make("bert"), padding_free=True, exclude="*layer.0*")
    assert "[PADDING_FREE]" in caplog.text
    monkeypatch.setenv("HF_FLASH_STRICT", "1")
    with pytest.raises(NotImplementedError, match="PADDING_FREE"):
        hf_flash.patch_model(tiny.make("bert"), padding_free=True, exclude="*layer.0*")


def test_padding_free_in_one_of_two_models(tiny, caplog):
    both = torch.nn.ModuleList([tiny.make("bert"), tiny.make("gpt2")])
    hf_flash.patch_model(both, padding_free=True, on_unsupported="error")
    shapes, inputs = shapes_of_queries(both), tiny.batch("bert")
    both[0](**inputs)
    assert shapes == {(1, int(inputs["attention_mask"].sum()))} and not caplog.records


def test_padding_free_under_hooks_of_accelerate(tiny, caplog):
    """They keep the forward that they call bound to the module: with a class that changes it changes too."""
    inputs = tiny.batch("bert")
    packed = {(1, int(inputs["attention_mask"].sum()))}
    for hooked_first, removed in ((True, False), (False, False), (True, True)):
        model = tiny.make("bert")
        before = model(**inputs).logits
        if not hooked_first:
            hf_flash.patch_model(model, padding_free=True, on_unsupported="error")
        accelerate.hooks.add_hook_to_module(model.bert.encoder, accelerate.hooks.ModelHook())
        if removed:
            accelerate.hooks.remove_hook_from_module(model.bert.encoder)
        shapes = shapes_of_queries(model)
        hf_flash.patch_model(model, padding_free=True, deterministic=True, on_unsupported="error")
        model(**inputs)
        assert shapes == packed and not caplog.records
        hf_flash.unpatch_model(model)
        assert torch.equal(model(**inputs).logits, before)


def test_padding_free_under_a_forward_of_its_own(tiny, caplog):
    model, inputs = tiny.make("bert"), tiny.batch("bert")
    forward = model.bert.encoder.forward
    model.bert.encoder.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(NotImplementedError, match=r"\[BOUND_FORWARD\]: bert.encoder .*before that forward is set"):
        hf_flash.patch_model(model, padding_free=True, on_unsupported="error")
    hf_flash.patch_model(model, padding_free=True)
    assert "BOUND_FORWARD" in caplog.text and hf_flash.is_patched(model)
    shapes = shapes_of_queries(model)
    model(**inputs)
    assert shapes == {(3, 13)}


def test_padding_free_with_checkpointing(tiny):
    eager = tiny.make("bert").train()
    model = hf_flash.patch_model(copy.deepcopy(eager), padding_free=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tiny.assert_same_step(eager, model, tiny.batch("bert"))


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_fullgraph_compile(tiny, name, padding):
    eager = tiny.make(name)
    model = tiny.twin(eager)
    inputs = {k: v for k, v in tiny.batch(name, padding).items() if k != "labels"}
    if name == "gpt2":
        inputs["use_cache"] = False
    valid = tiny.batch(name, padding)["labels"] != -100
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want, got = eager(**inputs).logits[valid], compiled(**inputs).logits[valid]
    assert (want - got).abs().max() <= 2e-5 * want.abs().max()
    want.square().sum().backward()
    got.square().sum().backward()
    for (parameter, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 2e-4 * max(1, p.grad.abs().max()), parameter
    assert "compiled" in str(hf_flash.explain(model))


class Logits(torch.nn.Module):
    """A model as torch.jit.trace takes one: tensors in, a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask).logits


@pytest.mark.filterwarnings("ignore")  # torch's own words on tracing
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_a_traced_model_serves_other_masks(tiny, name, padding_free):
    """What was true of the mask that it was traced with is not in the trace."""
    eager = tiny.make(name)
    model = hf_flash.patch_model(copy.deepcopy(eager), padding_free=padding_free, on_fallback="error")
    ids = tiny.batch(name, "none")["input_ids"]
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model), (ids, torch.ones_like(ids)), check_trace=False)
        for padding in ("right", "holes"):
            mask = tiny.batch(name, padding)["attention_mask"]
            want, got = eager(ids, attention_mask=mask).logits, traced(ids, mask)
            assert (want - got)[mask.bool()].abs().max() <= 2e-5 * want.abs().max()
    with pytest.raises(NotImplementedError, match=r"TRACE.*no_grad"):  # a trace has no gradient of ours
        torch.jit.trace(Logits(model), (ids, mask), check_trace=False)


@pytest.mark.skipif(transformers.__version__ < "5.1", reason="GPT-2 of 5.0 compiles with no static cache itself")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_row_with_a_static_cache_compiles_whole(tiny, name):
    """The length of such a cache stands on the device: nobody reads it to find packed sequences."""
    eager = tiny.make(name).eval()
    model = hf_flash.patch_model(copy.deepcopy(eager), on_fallback="error")
    ids = tiny.batch(name, "none")["input_ids"][:1]
    logits = []
    for run in (eager, torch.compile(model, backend="eager", fullgraph=True)):
        cache = transformers.StaticCache(config=eager.config, max_cache_len=24)
        with torch.no_grad():
            parts = [
                run(input_ids=ids[:, cut], past_key_values=cache, use_cache=True) for cut in (slice(9), slice(9, 13))
            ]
        logits.append(torch.cat([part.logits for part in parts], 1))
    assert (logits[0] - logits[1]).abs().max() <= 2e-5 * logits[0].abs().max()
