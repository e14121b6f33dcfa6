"""The way back from models that changed while they were patched, and from parts of models."""

import copy
import pickle

import numpy
import pytest
import torch

import hf_flash


def test_settings_made_while_patched_are_kept(tiny):
    model = tiny.make("gpt2")
    config = model.config
    hf_flash.patch_model(model)
    model.config.use_cache = False
    model.config.id2label = {0: "no", 1: "yes"}
    hf_flash.unpatch_model(model)
    assert model.config is config and config.use_cache is False and config.id2label == {0: "no", 1: "yes"}
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize("value", [torch.tensor([1.0, 2.0]), numpy.arange(3), {"weights": torch.ones(2)}])
def test_settings_that_cannot_be_compared(tiny, value):
    """Arrays say no yes or no. The way back takes them as they are."""
    model = tiny.make("bert")
    config, model.config.class_weights = model.config, value
    with hf_flash.patched(model):
        model.config.use_cache = False
    assert model.config is config and not hf_flash.is_patched(model) and config.use_cache is False
    assert str(config.class_weights) == str(value)


def test_nothing_is_touched_before_all_settings_are_known(tiny, monkeypatch):
    model = hf_flash.patch_model(tiny.make("t5"))  # three configs
    known = []
    changes = hf_flash.patching.ConfigCopy.changes

    def interrupted(config):
        known.append(changes(config))
        if len(known) == 3:
            raise KeyboardInterrupt
        return known[-1]

    monkeypatch.setattr(hf_flash.patching.ConfigCopy, "changes", interrupted)
    model.encoder.config.note = model.decoder.config.note = "mine"
    with pytest.raises(KeyboardInterrupt):
        hf_flash.unpatch_model(model)
    monkeypatch.undo()
    originals = [m.__dict__["_hf_flash"].configs["config"].original for m in (model.encoder, model.decoder)]
    assert not any(hasattr(config, "note") for config in originals)
    assert {row.status for row in hf_flash.explain(model).rows} == {"patched"}
    assert hf_flash.unpatch_model(model).encoder.config.note == "mine"


def test_a_part_cannot_be_unpatched_alone(tiny):
    """Its mask would be of the wrong kind. A part with all attention modules of its config can be."""
    model = hf_flash.patch_model(tiny.make("bert"))
    with pytest.raises(ValueError, match="1 of the 2 attention modules that share a config"):
        hf_flash.unpatch_model(model.bert.encoder.layer[0])
    assert [row.status for row in hf_flash.explain(model).rows] == ["patched"] * 2
    hf_flash.unpatch_model(model.bert)
    assert not hf_flash.is_patched(model)
    model(**tiny.batch("bert"))


def one_layer(model):
    """The first layer alone is left of a BERT."""
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    model.config.num_hidden_layers = 1
    return model


@pytest.mark.parametrize("travel", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_layers_cut_while_patched(tiny, travel):
    plain = one_layer(tiny.make("bert"))
    inputs = tiny.batch("bert")
    model = one_layer(travel(hf_flash.patch_model(tiny.make("bert"))))
    hf_flash.patch_model(model, deterministic=True)
    tiny.assert_same_step(plain, model, inputs)
    assert hf_flash.explain(model).share == 1.0
    assert not hf_flash.is_patched(hf_flash.unpatch_model(model))
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    with hf_flash.patched(tiny.make("bert")) as model:
        one_layer(model)
    assert not hf_flash.is_patched(model)


def test_layers_cut_from_a_module_of_the_users_own(tiny):
    """No model of Transformers stands above these layers, but patch_model was called with their list."""
    layers = hf_flash.patch_model(tiny.make("bert").bert.encoder.layer)
    del layers[1]
    assert not hf_flash.is_patched(hf_flash.unpatch_model(pickle.loads(pickle.dumps(layers))))
    assert not hf_flash.is_patched(hf_flash.unpatch_model(layers))


def test_layers_added_while_patched(tiny):
    model = hf_flash.patch_model(tiny.make("bert"))
    layers, inputs = model.bert.encoder.layer, tiny.batch("bert")
    layers.append(copy.deepcopy(layers[0]))  # patched as its model is
    layers.append(tiny.make("bert").bert.encoder.layer[0])  # not patched: calling again makes it so
    hf_flash.patch_model(model)
    model(**inputs)
    assert hf_flash.explain(model).share == 1.0 and len(hf_flash.explain(model).rows) == 4
    hf_flash.unpatch_model(model)
    assert not hf_flash.is_patched(model)
    plain = tiny.make("bert")
    plain.bert.encoder.layer.extend(copy.deepcopy(plain.bert.encoder.layer[0]) for _ in range(2))
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("copied", [False, True])
def test_a_layer_of_another_patched_model(tiny, copied):
    """In a model that is not patched it meets masks of another kind; patching or unpatching that model mends it."""
    inputs, plain = tiny.batch("bert"), tiny.make("bert")
    for mend in (hf_flash.patch_model, hf_flash.unpatch_model):
        teacher, student = hf_flash.patch_model(tiny.make("bert")), tiny.make("bert")
        layer = teacher.bert.encoder.layer[0]
        student.bert.encoder.layer[0] = copy.deepcopy(layer) if copied else layer
        mend(student)
        assert hf_flash.is_patched(student) == (mend is hf_flash.patch_model)
        tiny.assert_same_step(plain, student, inputs)


def test_patched_gives_a_part_its_patch_back(tiny):
    model = tiny.make("bert")
    hf_flash.patch_model(model.bert, deterministic=True)
    with hf_flash.patched(model, exclude="*layer.0*"):
        assert [row.status for row in hf_flash.explain(model).rows] == ["skipped", "patched"]
    assert [row.status for row in hf_flash.explain(model).rows] == ["patched"] * 2
    assert not hf_flash.is_patched(hf_flash.unpatch_model(model.bert))


def test_an_error_leaves_the_old_patch(tiny):
    model = hf_flash.patch_model(tiny.make("bert"), deterministic=True)
    model(**tiny.batch("bert"))
    records = [m.__dict__["_hf_flash"] for m in model.modules() if "_hf_flash" in m.__dict__]
    for arguments in ({"include": "nothing"}, {"exclude": lambda name, module: 1 / 0}):
        with pytest.raises((NotImplementedError, ZeroDivisionError)):
            hf_flash.patch_model(model, on_unsupported="error", **arguments)
        with (
            pytest.raises((NotImplementedError, ZeroDivisionError)),
            hf_flash.patched(model, on_unsupported="error", **arguments),
        ):
            raise AssertionError("the block must not run")
        kept = [m.__dict__["_hf_flash"] for m in model.modules() if "_hf_flash" in m.__dict__]
        assert len(kept) == len(records) and all(a is b for a, b in zip(kept, records, strict=True))
    assert hf_flash.explain(model).share == 1.0


def test_patched_refuses_what_it_could_not_give_back(tiny):
    model = hf_flash.patch_model(tiny.make("bert"))
    with pytest.raises(ValueError, match=r"BertModel.*could not be patched again"), hf_flash.patched(model.bert):
        pass
    assert hf_flash.is_patched(model.bert)
    with hf_flash.patched(model, fp32="error"):
        pass
    assert hf_flash.is_patched(model)
    seq2seq = hf_flash.patch_model(tiny.make("bart"))
    hf_flash.unpatch_model(seq2seq.model.encoder)
    with pytest.raises(ValueError, match="could not be patched again"), hf_flash.patched(seq2seq):
        pass
    assert not hf_flash.is_patched(seq2seq.model.encoder) and hf_flash.is_patched(seq2seq.model.decoder)


def test_layers_made_of_a_patched_config_come_along(tiny):
    model = hf_flash.patch_model(tiny.make("bert"))
    layers = model.bert.encoder.layer
    layers.append(type(layers[0])(model.config, layer_idx=2).eval())
    assert hf_flash.is_patched(layers[2])
    hf_flash.unpatch_model(model)
    assert not hf_flash.is_patched(model)
    assert all(layer.attention.self.config is model.config for layer in layers)
