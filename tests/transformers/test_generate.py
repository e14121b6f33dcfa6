"""Decoding with caches: the same tokens as eager attention."""

import pytest
import torch

import hf_flash


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "no"])
@pytest.mark.parametrize("name", ["bart", "gpt2", "llama", "t5"])
def test_same_tokens(tiny, name, cache, padding, beams):
    eager = tiny.make(name)
    ours = tiny.twin(eager)
    inputs = {k: v for k, v in tiny.batch(name, padding).items() if k in ("input_ids", "attention_mask")}
    common = {"max_new_tokens": 7, "do_sample": False, "num_beams": beams}
    want = eager.generate(**inputs, **common)
    how = {"dynamic": {}, "static": {"cache_implementation": "static"}, "no": {"use_cache": False}}[cache]
    got = ours.generate(**inputs, **common, **how)
    assert torch.equal(got, want)
    assert hf_flash.explain(ours).share == 1.0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_cache_continues_with_several_tokens(tiny, name):
    """A second call with more than one new token: causal, bottom-right."""
    eager = tiny.make(name)
    ours = tiny.twin(eager)
    inputs = tiny.batch(name, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    results = []
    for model in (eager, ours):
        first = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
        results.append(model(ids[:, 8:], attention_mask=mask, past_key_values=first.past_key_values).logits)
    assert (results[0] - results[1]).abs().max() <= 2e-5 * results[0].abs().max()


def test_bert_as_a_decoder_over_an_encoder(tiny):
    """Causal self-attention, cross-attention with a padded memory, and without a mask for it."""
    eager = tiny.make("bert", is_decoder=True, add_cross_attention=True)
    ours = tiny.twin(eager)
    inputs = tiny.batch("bert", "right") | {"encoder_hidden_states": torch.randn(3, 6, 32)}
    memory_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    tiny.assert_same_step(eager, ours, inputs | {"encoder_attention_mask": memory_mask})
    tiny.assert_same_step(eager, ours, inputs)


def test_gpt2_over_an_encoder(tiny):
    eager = tiny.make("gpt2", add_cross_attention=True)
    ours = tiny.twin(eager)
    inputs = tiny.batch("gpt2", "right") | {"encoder_hidden_states": torch.randn(3, 6, 32)}
    memory_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    tiny.assert_same_step(eager, ours, inputs | {"encoder_attention_mask": memory_mask})
    tiny.assert_same_step(eager, ours, inputs)


@pytest.mark.parametrize("config", [{"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True}])
def test_gpt2_scores(tiny, config):
    """Factors of its own: served, or in transformers 5.0, which tells nobody of them, run in GPT-2's own attention."""
    eager = tiny.make("gpt2", **config)
    ours = hf_flash.patch_model(tiny.make("gpt2", **config))
    tiny.assert_same_step(eager, ours, tiny.batch("gpt2", "right"))
    told = hasattr(eager.transformer.h[0].attn, "scaling") or "reorder_and_upcast_attn" in config
    assert hf_flash.explain(ours).reasons().keys() == (set() if told else {"SCALING"})


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_one_encoder_output_for_several_rows(tiny, name):
    eager = tiny.make(name)
    encoded = eager.get_encoder()(input_ids=torch.arange(3, 13)[None])
    given = {"encoder_outputs": encoded, "decoder_input_ids": torch.arange(3, 18).view(3, 5), "use_cache": False}
    try:
        want = eager(**given).logits
    except RuntimeError:
        pytest.skip("the attention of this release's T5 takes no such thing")
    torch.testing.assert_close(tiny.twin(eager)(**given).logits, want, rtol=1e-4, atol=1e-4)
