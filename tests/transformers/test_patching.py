"""patch_model and its way back: what must not change does not, and undoing is exact."""

import copy
import io
import logging
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

import hf_flash

NAMED = ["bert", "distilbert", "gpt2", "llama", "t5", "bart"]


def state(model):
    """Everything about a model that a patch must leave alone."""
    return {
        "keys": list(model.state_dict()),
        "values": [t.clone() for t in model.state_dict().values()],
        "places": [p.data_ptr() for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
        "random": torch.get_rng_state().tolist(),
        "config": model.config.to_dict(),
    }


def assert_same_state(a, b):
    for key in a:
        if key == "values":
            assert all(torch.equal(x, y) for x, y in zip(a[key], b[key], strict=True))
        else:
            assert a[key] == b[key], key


def internals(model):
    """Class, attributes and hooks of every module."""
    return [
        (name, type(m), {k: id(v) for k, v in m.__dict__.items() if not k.startswith("_")}, sorted(m.__dict__),
         list(m._forward_hooks.values()), list(m._forward_pre_hooks.values()))
        for name, m in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_nothing_but_attention_changes_and_undo_is_exact(tiny, name, padding_free):
    model = tiny.make(name)
    model.eval()
    next(iter(model.children())).train()
    inputs = tiny.batch(name)
    reference = model(**inputs).logits
    calls = []

    def user_hook(module, args, output):
        calls.append(module)

    def user_pre_hook(module, args):
        calls.append(module)

    for module in model.modules():
        module.register_forward_hook(user_hook)
        module.register_forward_pre_hook(user_pre_hook)
    before, inside = state(model), internals(model)
    assert hf_flash.patch_model(model, padding_free=padding_free) is model
    assert hf_flash.is_patched(model)
    assert_same_state(before, state(model))
    patched = internals(model)
    hf_flash.patch_model(model, padding_free=padding_free)
    assert internals(model) == patched  # idempotent
    model(**inputs)
    assert calls
    torch.set_rng_state(torch.tensor(before["random"], dtype=torch.uint8))
    hf_flash.unpatch_model(model)
    assert not hf_flash.is_patched(model)
    assert_same_state(before, state(model))
    assert internals(model) == inside
    assert torch.equal(model(**inputs).logits, reference)
    hf_flash.unpatch_model(model)  # nothing left to undo


def test_two_models_of_one_config_stay_apart(tiny):
    config = tiny.make("bert").config
    first, second = (transformers.BertModel(config) for _ in range(2))
    hf_flash.patch_model(first)
    assert hf_flash.is_patched(first) and not hf_flash.is_patched(second)
    assert second.config is config and config._attn_implementation == "eager"
    assert first.config is first.encoder.config  # the copy is one object, as the original was
    hf_flash.unpatch_model(first)
    assert first.config is config


def test_with_statement_restores_after_an_exception(tiny):
    model = tiny.make("bert")
    with hf_flash.patched(model) as same:
        assert same is model and hf_flash.is_patched(model)
    assert not hf_flash.is_patched(model)
    with pytest.raises(ZeroDivisionError), hf_flash.patched(model):
        raise ZeroDivisionError
    assert not hf_flash.is_patched(model)
    hf_flash.patch_model(model, deterministic=True)
    with hf_flash.patched(model, deterministic=False):
        assert model.base_model.encoder.layer[0].attention.self._hf_flash.options.deterministic is False
    assert model.base_model.encoder.layer[0].attention.self._hf_flash.options.deterministic is True


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_deepcopy_and_pickle(tiny, name, padding_free):
    model = tiny.make(name)
    inputs = tiny.batch(name)
    hf_flash.patch_model(model, padding_free=padding_free)
    want = model(**inputs).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert hf_flash.is_patched(other) and torch.equal(other(**inputs).logits, want)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        assert (other(**inputs).logits - want).abs().max() > 0.01  # its own weights
        assert torch.equal(model(**inputs).logits, want)
        assert other.config is not model.config
        hf_flash.unpatch_model(other)
        assert not hf_flash.is_patched(other) and hf_flash.is_patched(model)
        assert other.config._attn_implementation == "eager"
        assert [type(m) for m in other.modules()] == [type(m) for m in tiny.make(name).modules()]


def test_saved_model_loads_without_hf_flash(tiny, tmp_path):
    model = hf_flash.patch_model(tiny.make("bert"), padding_free=True)
    model.save_pretrained(tmp_path)
    inputs = tiny.batch("bert", "none")
    torch.save((inputs["input_ids"], model(**inputs).logits.detach()), tmp_path / "expected.pt")
    assert "hf_flash" not in (tmp_path / "config.json").read_text()
    code = (
        "import sys, torch, transformers\n"
        f"model = transformers.BertForMaskedLM.from_pretrained({str(tmp_path)!r})\n"
        f"ids, want = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "error = (model(ids).logits - want).abs().max()\n"
        "assert error < 1e-4, error\n"
        "assert 'hf_flash' not in sys.modules and model.config._attn_implementation == 'sdpa'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_attention_implementation_everywhere(tiny, tmp_path):
    model = tiny.make("bert")
    model.save_pretrained(tmp_path)
    inputs = tiny.batch("bert")
    want = model(**inputs).logits
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="hf_flash").eval()
    made = transformers.AutoModelForMaskedLM.from_config(model.config, attn_implementation="hf_flash").eval()
    made.load_state_dict(model.state_dict())
    model.set_attn_implementation("hf_flash")
    for other in (loaded, made, model):
        assert other.config._attn_implementation == "hf_flash" and hf_flash.is_patched(other)
        got = other(**inputs).logits
        valid = inputs["attention_mask"].bool()
        assert (want - got)[valid].abs().max() < 1e-5
        assert hf_flash.explain(other).share == 1.0
    model.set_attn_implementation("sdpa")
    assert not hf_flash.is_patched(model)


def test_include_and_exclude(tiny):
    eager = tiny.make("bert")
    inputs = tiny.batch("bert")
    for arguments in (
        {"include": "bert.encoder.layer.0.*"},
        {"exclude": ["*.layer.1.*"]},
        {"include": lambda name, module: ".0." in name},
    ):
        model = hf_flash.patch_model(tiny.make("bert"), **arguments)
        tiny.assert_same_step(eager, model, inputs)
        rows = hf_flash.explain(model).rows
        assert [row.status for row in rows] == ["patched", "skipped"]
        assert rows[0].served == 1 and rows[1].served == 0 and rows[1].code == "EXCLUDED"
    model = hf_flash.patch_model(tiny.make("bert"), include="nothing.*")
    assert not hf_flash.is_patched(model) and model.config._attn_implementation == "eager"


class Wrapper(nn.Module):
    """A user's module around two models."""

    def __init__(self, tiny):
        super().__init__()
        self.first, self.second = tiny.make("bert"), tiny.make("gpt2")


def test_any_module_that_holds_models(tiny):
    wrapper = hf_flash.patch_model(Wrapper(tiny))
    assert hf_flash.is_patched(wrapper.first) and hf_flash.is_patched(wrapper.second)
    hf_flash.unpatch_model(wrapper.first)
    assert not hf_flash.is_patched(wrapper.first) and hf_flash.is_patched(wrapper.second)


def test_report(tiny, caplog):
    with caplog.at_level(logging.INFO, logger="hf_flash"):
        model = hf_flash.patch_model(tiny.make("bert"))
    assert len(caplog.records) == 1 and "2 patched" in caplog.text
    report = hf_flash.explain(model)
    assert report.share is None and [row.name for row in report.rows] == [
        "bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self",
    ]  # fmt: skip
    model(**tiny.batch("bert"))
    model(**tiny.batch("bert"), output_attentions=True)
    report = hf_flash.explain(model)
    assert report.share == 0.5 and report.calls == 4
    text = str(report)
    assert "50.0% of 4 attention calls served" in text and "OUTPUT_ATTENTIONS x1" in text and "[OUTPUT_ATT" in text
    assert hf_flash.explain(tiny.make("bert")).reasons().keys() == {"NOT_PATCHED"}


def test_counts(tiny):
    """Replicas of nn.DataParallel count for their module, copies for themselves; patching anew goes on counting."""
    model = hf_flash.patch_model(tiny.make("bert"))
    module = model.bert.encoder.layer[0].attention.self
    module._replicate_for_data_parallel()(torch.randn(2, 6, 32))
    assert [row.served for row in hf_flash.explain(model).rows] == [1, 0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hf_flash.explain(other).calls == 0
        other.bert.encoder.layer[0].attention.self._replicate_for_data_parallel()(torch.randn(2, 6, 32))
        assert hf_flash.explain(other).calls == 1 and hf_flash.explain(model).calls == 1
    hf_flash.patch_model(model, deterministic=True)
    assert hf_flash.explain(model).calls == 1
    hf_flash.patch_model(hf_flash.unpatch_model(model))
    assert hf_flash.explain(model).calls == 0


@pytest.mark.parametrize("argument", ["on_unsupported", "on_fallback", "fp32"])
def test_wrong_arguments(tiny, argument):
    with pytest.raises(ValueError, match=f"{argument}='maybe'"):
        hf_flash.patch_model(tiny.make("bert"), **{argument: "maybe"})


def test_a_gpu_without_kernels_is_announced(tiny, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("hf_flash.ops.has_kernel", lambda name, device: device == "cpu")
    monkeypatch.setattr("hf_flash.patching._warned_cuda", False)
    monkeypatch.setitem(
        __import__("hf_flash.ops").ops.LIBRARIES, "cuda", "not loaded: hf_flash was built without CUDA; install nvcc"
    )
    hf_flash.patch_model(tiny.make("bert"))
    hf_flash.patch_model(tiny.make("bert"))
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(messages) == 1 and "install nvcc" in messages[0]


def test_patching_after_another_switch(tiny):
    model = hf_flash.patch_model(tiny.make("bert"))
    model.set_attn_implementation("eager")
    assert not hf_flash.is_patched(model)
    assert hf_flash.is_patched(hf_flash.patch_model(model))


def test_hooks_of_attn_implementation_outlive_patched(tiny):
    """DistilBERT hears of packed sequences through a hook."""
    model = tiny.make("distilbert", "hf_flash")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    inputs = {"input_ids": torch.arange(3, 10)[None], "position_ids": positions}
    before = model(**inputs).logits
    with hf_flash.patched(model, deterministic=True):
        torch.testing.assert_close(model(**inputs).logits, before)
    torch.testing.assert_close(model(**inputs).logits, before)
    alone = model(input_ids=inputs["input_ids"][:, :4], position_ids=positions[:, :4]).logits
    torch.testing.assert_close(before[:, :4], alone)


def test_a_head_of_the_users_own(tiny):
    """An attention module that Transformers does not know blocks the model unless it is left out."""
    model = tiny.make("bert")
    model.pool = nn.MultiheadAttention(32, 4)
    with pytest.raises(NotImplementedError, match="exclude='pool' leaves that module alone"):
        hf_flash.patch_model(model, on_unsupported="error")
    hf_flash.patch_model(model, exclude="pool", on_unsupported="ignore")
    assert [row.status for row in hf_flash.explain(model).rows] == ["patched", "patched", "skipped"]


def test_include_may_be_any_iterable(tiny):
    model = hf_flash.patch_model(tiny.make("bert"), include=(pattern for pattern in ["bert.*"]))
    assert [row.status for row in hf_flash.explain(model).rows] == ["patched"] * 2
    assert hf_flash.patch_model(model, include=["bert.*"]) is model


def test_a_pattern_that_selects_nothing(tiny):
    with pytest.raises(NotImplementedError, match=r"leave none of the 2 .*'bert.encoder.layer.0.attention.self'"):
        hf_flash.patch_model(tiny.make("bert"), include="encoder.layers.*", on_unsupported="error")


def test_a_model_patched_by_functions_can_be_pickled(tiny):
    model = hf_flash.patch_model(tiny.make("bert"), exclude=lambda name, module: "layer.0" in name)
    again = pickle.loads(pickle.dumps(model))
    assert [row.status for row in hf_flash.explain(again).rows] == ["skipped", "patched"]
    assert not hf_flash.is_patched(hf_flash.unpatch_model(again))


def test_a_config_that_asks_for_all_weights_stays(tiny, tmp_path):
    """Transformers would refuse to save it with any attention but eager's."""
    model = tiny.make("bert", output_attentions=True)
    with pytest.raises(NotImplementedError, match=r"OUTPUT_ATTENTIONS.*set it to False"):
        hf_flash.patch_model(model, on_unsupported="error")
    assert not hf_flash.is_patched(hf_flash.patch_model(model, on_unsupported="ignore"))
    model.save_pretrained(tmp_path)
    model.config.output_attentions = False
    assert hf_flash.is_patched(hf_flash.patch_model(model, on_unsupported="error"))


@pytest.mark.skipif(not hasattr(transformers, "GptOssConfig"), reason="no GPT-OSS here")
def test_models_with_flash_kernels_of_their_own_are_refused_in_our_words():
    config = transformers.GptOssConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=16, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"hf_flash \[MODEL\]"):
        transformers.AutoModel.from_config(config, attn_implementation="hf_flash")


def test_what_was_left_out_is_told_so(tiny):
    model = hf_flash.patch_model(tiny.make("t5"), exclude="encoder.*")
    rows = hf_flash.explain(model).rows
    assert {row.code for row in rows if row.name.startswith("encoder.")} == {"EXCLUDED"}
    assert {row.status for row in rows if row.name.startswith("decoder.")} == {"patched"}
