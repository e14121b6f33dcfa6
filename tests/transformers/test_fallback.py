"""What our kernel does not serve runs in Transformers' own attention, with its code in the report, or raises."""

import copy
import inspect
import logging

import pytest
import torch
import transformers

import hf_flash
from hf_flash import report


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(report, "_WARNED", set())
    monkeypatch.delenv("HF_FLASH_STRICT", raising=False)
    monkeypatch.delenv("HF_FLASH_DISABLE", raising=False)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart", "llama"])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
def test_without_a_kernel_sdpa_computes_the_same(tiny, name, padding, monkeypatch):
    monkeypatch.setattr("hf_flash.support.device_reason", lambda *a: ("NO_KERNEL", "none in this test"))
    eager = tiny.make(name)
    ours = hf_flash.patch_model(tiny.make(name))
    tiny.assert_same_step(eager, ours, tiny.batch(name, padding))
    assert hf_flash.explain(ours).share == 0.0
    assert hf_flash.explain(ours).reasons() == {"NO_KERNEL": "none in this test"}


def test_one_warning_for_each_reason(tiny, monkeypatch, caplog):
    monkeypatch.setattr("hf_flash.support.device_reason", lambda *a: ("NO_KERNEL", "none in this test"))
    ours = hf_flash.patch_model(tiny.make("bert"))
    for _ in range(3):
        ours(**tiny.batch("bert"))
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(messages) == 1 and "[NO_KERNEL]" in messages[0] and "BertSelfAttention" in messages[0]


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama", "t5", "bart"])
def test_output_attentions(tiny, name):
    eager, ours = tiny.make(name), hf_flash.patch_model(tiny.make(name))
    inputs = tiny.batch(name)
    if name == "gpt2" and "output_attentions" in inspect.signature(eager.base_model.forward).parameters:
        with pytest.raises(ValueError, match="OUTPUT_ATTENTIONS"):  # transformers 5.0
            ours(**inputs, output_attentions=True)
        return
    want, got = eager(**inputs, output_attentions=True), ours(**inputs, output_attentions=True)
    for field in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        if getattr(want, field, None):
            weights = getattr(got, field)
            assert len(weights) == len(getattr(want, field)) > 0
            for a, b in zip(getattr(want, field), weights, strict=True):
                assert (a - b).abs().max() < 1e-5
    assert "OUTPUT_ATTENTIONS" in hf_flash.explain(ours).reasons()
    assert torch.equal(ours(**inputs).logits.isfinite(), torch.ones_like(got.logits).bool())


def test_head_dimension(tiny):
    eager = tiny.make("bert", hidden_size=24, num_attention_heads=4)
    ours = hf_flash.patch_model(tiny.make("bert", hidden_size=24, num_attention_heads=4))
    tiny.assert_same_step(eager, ours, tiny.batch("bert"))
    reasons = hf_flash.explain(ours).reasons()
    assert "head_dim 6" in reasons["HEAD_DIM"]
    strict = hf_flash.patch_model(tiny.make("bert", hidden_size=24), on_fallback="error")
    with pytest.raises(ValueError, match="HEAD_DIM"):
        strict(**tiny.batch("bert"))


def attention_call(module, **keywords):
    """One call of the attention function as a model would make it."""
    from hf_flash.backend import attention_forward

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 4, 4))
    return attention_forward(module, q, k, v, None, scaling=0.3, **keywords)[0]


def test_unknown_keywords(tiny):
    module = hf_flash.patch_model(tiny.make("bert")).bert.encoder.layer[0].attention.self
    plain = attention_call(module)
    assert torch.allclose(attention_call(module, block_indices=torch.ones(1)), plain, atol=1e-5)
    assert report.calls_of(module).fallbacks == {"KEYWORD": 1}
    assert "block_indices" in report.calls_of(module).reasons["KEYWORD"]
    attention_call(module, use_cache=True, some_flag=None, other_flag=False, num_items_in_batch=3)
    assert report.calls_of(module).fallbacks == {"KEYWORD": 1}
    strict = hf_flash.patch_model(tiny.make("bert"), on_fallback="error").bert.encoder.layer[0].attention.self
    with pytest.raises(NotImplementedError, match=r"KEYWORD.*block_indices"):
        attention_call(strict, block_indices=torch.ones(1))


def test_softcap_window_and_sink_are_honoured(tiny):
    """Keywords with a meaning that sdpa would drop: against the reference."""
    from hf_flash.reference import reference_attention

    module = hf_flash.patch_model(tiny.make("llama")).model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    from hf_flash.backend import attention_forward

    rows = [t.transpose(1, 2) for t in (q, k, v)]
    sink = torch.randn(4)
    for keywords, expected in (
        ({"softcap": 0.5}, {"softcap": 0.5}),
        ({"s_aux": sink}, {"sink": sink}),
        ({"sliding_window": 2}, {"window": (1, 0)}),
        ({"is_causal": False}, {"causal": False}),
        ({"position_bias": q @ q.mT}, {"bias": q @ q.mT}),
    ):
        want = reference_attention(*rows, scale=0.7, **({"causal": True} | expected))[0]
        got = attention_forward(module, q, k, v, None, scaling=0.7, **keywords)[0]
        assert (want - got).abs().max() < 1e-5, keywords
        assert report.calls_of(module).fallbacks == {}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_four_dimensional_masks(tiny, name, kind):
    eager = tiny.make(name)
    ours = tiny.twin(eager)
    inputs = tiny.batch(name, "none")
    generator = torch.Generator().manual_seed(7)
    visible = torch.rand(3, 1, 13, 13, generator=generator) < 0.6
    visible |= torch.eye(13, dtype=torch.bool)
    if name != "bert":
        visible &= torch.ones(13, 13).tril().bool()
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    tiny_step = tiny.step(eager, inputs | {"attention_mask": added})
    got = tiny.step(ours, inputs | {"attention_mask": visible if kind == "bool" else added})
    assert (tiny_step[0] - got[0]).abs().max() <= 2e-5 * got[0].abs().max()
    for parameter, grad in tiny_step[2].items():
        assert (grad - got[2][parameter]).abs().max() < 2e-4 * max(1, grad.abs().max()), parameter
    assert hf_flash.explain(ours).share == 1.0


def test_masks_of_other_shapes_are_refused(tiny):
    from hf_flash.backend import attention_forward

    module = hf_flash.patch_model(tiny.make("bert")).bert.encoder.layer[0].attention.self
    q = torch.randn(2, 4, 5, 8)
    for mask in (torch.ones(2, 5, 5), torch.ones(2, 1, 5, 5, dtype=torch.long), torch.ones(2, 4)):
        with pytest.raises(ValueError, match="attention_mask has shape"):
            attention_forward(module, q, q, q, mask)
    padded = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    got = attention_forward(module, q, q, q, padded, is_causal=False)[0]
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=padded[:, None, None].bool())
    assert (got - want.transpose(1, 2)).abs().max() < 1e-5


def test_fully_padded_rows_stay_finite(tiny):
    for name in ("bert", "gpt2", "llama"):
        ours = tiny.twin(tiny.make(name))
        inputs = tiny.batch(name)
        inputs["attention_mask"][2] = 0
        inputs["labels"][2] = -100
        logits, _, grads = tiny.step(ours, inputs)
        assert logits.isfinite().all() and all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_autocast_dtype_is_used(tiny, name):
    eager = tiny.make(name)
    ours = tiny.twin(eager)
    inputs = tiny.batch(name)
    seen = []
    from hf_flash import attention

    original = attention.judged_attention

    def spy(q, k, v, **keywords):
        seen.append({q.dtype, k.dtype, v.dtype})
        return original(q, k, v, **keywords)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(attention, "judged_attention", spy)
        got = tiny.step(ours, inputs)
        want = tiny.step(eager, inputs)
    assert seen and all(dtypes == {torch.bfloat16} for dtypes in seen)
    exact = tiny.step(eager, inputs)
    error, theirs = (got[0] - exact[0]).abs().max(), (want[0] - exact[0]).abs().max()
    assert error <= 2 * theirs + 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(tiny, dtype):
    exact = tiny.make("bert", dtype=torch.float64)
    ours, eager = tiny.twin(tiny.make("bert", dtype=dtype)), tiny.make("bert", dtype=dtype)
    inputs = tiny.batch("bert")
    valid = inputs["attention_mask"].bool()
    want = exact(**inputs).logits[valid]
    error = (ours(**inputs).logits[valid] - want).abs().max()
    assert error <= 2 * (eager(**inputs).logits[valid] - want).abs().max() + 1e-9


def only_half_precision(device, index, dtype):
    return ("FP32", "the kernels of this test take half precision") if dtype == torch.float32 else None


@pytest.mark.parametrize("fp32", ["fallback", "error", "bfloat16", "float16"])
def test_fp32_where_kernels_take_half_precision(tiny, fp32, monkeypatch):
    monkeypatch.setattr("hf_flash.support.device_reason", only_half_precision)
    eager, ours = tiny.make("bert"), hf_flash.patch_model(tiny.make("bert"), fp32=fp32)
    inputs = tiny.batch("bert")
    if fp32 == "error":
        with pytest.raises(NotImplementedError, match="FP32"):
            ours(**inputs)
        return
    got = ours(**inputs).logits
    valid = inputs["attention_mask"].bool()
    error = (eager(**inputs).logits - got)[valid].abs().max()
    assert got.dtype == torch.float32
    summary = hf_flash.explain(ours)
    if fp32 == "fallback":
        assert error < 1e-5 and summary.share == 0 and summary.reasons().keys() == {"FP32"}
    else:
        assert 1e-5 < error < 0.1 and summary.share == 1


def test_deterministic_reaches_the_kernel(tiny, monkeypatch):
    from hf_flash import attention

    seen = []
    original = attention.judged_attention
    monkeypatch.setattr(
        attention, "judged_attention", lambda *a, **k: (seen.append(k["deterministic"]), original(*a, **k))[1]
    )
    for value in (True, False, None):
        hf_flash.patch_model(tiny.make("bert"), deterministic=value)(**tiny.batch("bert"))
        assert set(seen) == {value}
        seen.clear()


def test_disable(tiny, monkeypatch):
    eager, ours = tiny.make("bert"), tiny.twin(tiny.make("bert"))
    monkeypatch.setenv("HF_FLASH_DISABLE", "1")
    tiny.assert_same_step(eager, ours, tiny.batch("bert"))
    assert hf_flash.explain(ours).reasons().keys() == {"DISABLED"}
    assert not hf_flash.is_patched(hf_flash.patch_model(tiny.make("bert")))


def test_strict(tiny, monkeypatch):
    monkeypatch.setenv("HF_FLASH_STRICT", "1")
    ours = hf_flash.patch_model(tiny.make("bert"))
    ours(**tiny.batch("bert"))
    with pytest.raises(NotImplementedError, match="OUTPUT_ATTENTIONS"):
        ours(**tiny.batch("bert"), output_attentions=True)
    with pytest.raises(NotImplementedError, match="REL_POS_BIAS"):
        hf_flash.patch_model(deberta())


def deberta():
    return transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=20
        )
    )


def bloom():
    return transformers.BloomModel(transformers.BloomConfig(vocab_size=20, hidden_size=32, n_layer=1, n_head=4))


def megatron():
    return transformers.MegatronBertModel(
        transformers.MegatronBertConfig(
            vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=20
        )
    )


@pytest.mark.parametrize(("make", "code"), [(deberta, "REL_POS_BIAS"), (bloom, "ALIBI"), (megatron, "MODEL")])
def test_models_off_the_list(make, code, caplog):
    """Not one of the ways in computes them wrongly: an error, or a model left as it was and a warning."""
    model = make().eval()
    ids = torch.arange(3, 9)[None]
    before = model(ids)[0]
    with pytest.raises(ValueError, match=code):
        model.set_attn_implementation("hf_flash")
    with pytest.raises(ValueError, match=code):
        transformers.AutoModel.from_config(copy.deepcopy(model.config), attn_implementation="hf_flash")
    with pytest.raises(NotImplementedError, match=code):
        hf_flash.patch_model(model, on_unsupported="error")
    assert hf_flash.patch_model(model) is model
    assert f"[{code}]" in caplog.text and not hf_flash.is_patched(model)
    assert hf_flash.explain(model).reasons().keys() == {code}
    assert torch.equal(model(ids)[0], before)


def test_an_unknown_attention_module_falls_back(tiny):
    """A class derived from one on the list, with a forward of its own, is not served."""
    model = tiny.make("bert")
    module = model.bert.encoder.layer[0].attention.self

    class Mine(type(module)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Derived(type(module)):
        pass

    module.__class__ = Derived
    assert hf_flash.explain(hf_flash.patch_model(model, on_unsupported="error")).rows[0].status == "patched"
    hf_flash.unpatch_model(model)
    module.__class__ = Mine
    model.set_attn_implementation("hf_flash")
    model(**tiny.batch("bert"))
    rows = hf_flash.explain(model).rows
    assert rows[0].status == "skipped" and rows[0].code == "MODEL" and rows[1].served == 1
    hf_flash.unpatch_model(model)
    model.set_attn_implementation("eager")
    hf_flash.patch_model(model, on_unsupported="ignore")
    assert not hf_flash.is_patched(model)


def test_a_module_with_a_forward_of_its_own(tiny, monkeypatch):
    """Where a release needs a replacement class for T5Attention, that class would not be called."""
    model = tiny.make("t5")
    module = model.decoder.block[1].layer[0].SelfAttention
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    hf_flash.patch_model(model.encoder, on_unsupported="error")
    monkeypatch.setattr("hf_flash.registry.through_interface", lambda cls: False)
    with pytest.raises(NotImplementedError, match=r"4 of 6 .*BOUND_FORWARD\].*decoder.block.1.layer.0.SelfAttention"):
        hf_flash.patch_model(model, on_unsupported="error")


def test_paged_cache_is_refused(tiny):
    module = hf_flash.patch_model(tiny.make("llama"), on_fallback="error").model.layers[0].self_attn
    with pytest.raises(NotImplementedError, match="PAGED_CACHE"):
        attention_call(module, cache=object())


@pytest.mark.skipif(not hasattr(transformers.PreTrainedModel, "generate_batch"), reason="no continuous batching here")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_continuous_batching_falls_back_to_the_same_tokens(tiny, name):
    """Its queries are the last ones of longer rows of keys, all sequences side by side."""
    model = tiny.make(name, "sdpa")
    settings = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17, 18]]

    def tokens():
        results = model.generate_batch(prompts, generation_config=settings, progress_bar=False)
        return sorted(tuple(result.generated_tokens) for result in results.values())

    wanted = tokens()
    hf_flash.patch_model(model, on_fallback="ignore")
    assert tokens() == wanted and len(wanted) == 3
    assert {row.code for row in hf_flash.explain(model).rows} == {"PAGED_CACHE"}


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_labels_change_nothing(tiny, name):
    """Seq2SeqTrainer hands them to generate(), which hands them to the encoder's attention."""
    model, inputs = tiny.twin(tiny.make(name)), tiny.batch(name)
    given = {key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}
    tokens = model.generate(**given, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, tiny.make(name).generate(**given, max_new_tokens=5, do_sample=False))
    assert hf_flash.explain(model).share == 1.0


def test_dropout_of_everything_falls_back(tiny):
    eager = tiny.make("bert", attention_probs_dropout_prob=1.0).train()
    ours = hf_flash.patch_model(copy.deepcopy(eager), on_fallback="ignore")
    tiny.assert_same_step(eager, ours, tiny.batch("bert"))
    assert hf_flash.explain(ours).reasons().keys() == {"DROPOUT"}


def test_the_meta_device(tiny):
    from hf_flash.backend import attention_forward

    model = hf_flash.patch_model(tiny.make("bert").to("meta"), on_fallback="ignore")
    q = torch.empty(2, 4, 9, 8, device="meta")
    out, _ = attention_forward(model.bert.encoder.layer[0].attention.self, q, q, q, None)
    assert out.shape == (2, 9, 4, 8) and out.device.type == "meta"
    assert hf_flash.explain(model).reasons().keys() == {"DEVICE"}
