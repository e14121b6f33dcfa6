"""Packed sequences never see each other: a packed row equals its sequences one by one, gradients too."""

import inspect

import pytest
import torch
import transformers
from tiny_models import TINY

import hf_flash
from hf_flash.registry import through_interface

LENGTHS = (5, 1, 7)
MODELS = sorted(name for name, model in TINY.items() if model.kind != "seq2seq")


def sequences():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 61, (1, length), generator=generator) for length in LENGTHS]


def packed_inputs(how):
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    inputs = {"input_ids": torch.cat(sequences(), 1), "position_ids": positions}
    if how == "keywords":
        cu_seqlens = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 7, "max_length_k": 7}
    if how == "keywords alone":
        cu_seqlens = torch.tensor([0, 5, 6, 13])
        inputs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens.clone()}
    return inputs


def one_by_one(model):
    rows = [model(input_ids=s, position_ids=torch.arange(s.shape[1])[None]).logits for s in sequences()]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("how", ["positions", "keywords", "keywords alone"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_separate(tiny, name, how):
    eager = tiny.make(name)
    ours = tiny.twin(eager)
    want, got = one_by_one(eager), ours(**packed_inputs(how)).logits
    assert (want - got).abs().max() <= 2e-5 * want.abs().max()
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    for (parameter, p), q in zip(eager.named_parameters(), ours.parameters(), strict=True):
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 2e-4 * max(1.0, p.grad.abs().max()), parameter
    assert hf_flash.explain(ours).share == 1.0


def test_without_packing_the_results_differ(tiny):
    """The comparison above can fail: eager attention lets packed sequences see each other."""
    eager = tiny.make("bert")
    assert (one_by_one(eager) - eager(**packed_inputs("keywords")).logits).abs().max() > 0.1


@pytest.mark.parametrize("name", ["distilbert", "gpt2"])
def test_announced_by_position_arguments_too(tiny, name):
    ours = tiny.twin(tiny.make(name))
    base = ours.base_model
    inputs = packed_inputs("positions")
    by_name = base(**inputs)[0]
    if name == "distilbert":
        by_place = base(inputs["input_ids"], None, position_ids=inputs["position_ids"])[0]
    else:
        by_place = base(inputs["input_ids"], None, None, position_ids=inputs["position_ids"])[0]
    assert torch.equal(by_name, by_place)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_the_collator_of_transformers(tiny, name):
    """DataCollatorWithFlattening's batch gives the padded batch's loss."""
    features = [{"input_ids": s[0].tolist(), "labels": s[0].tolist()} for s in sequences()]
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(features)
    model = tiny.make(name)
    ours = tiny.twin(model)
    got = ours(**batch).loss
    losses, count = 0.0, 0
    for s in sequences():
        labels = s.clone()
        labels[0, 0] = -100  # as the collator does
        valid = int((labels[:, 1:] if tiny.models[name].kind == "decoder" else labels).ne(-100).sum())
        if valid:
            positions = torch.arange(s.shape[1])[None]
            losses += model(input_ids=s, labels=labels, position_ids=positions).loss * valid
            count += valid
    assert abs(got - losses / count) <= 1e-5 * abs(got)


@pytest.mark.parametrize("how", ["positions", "keywords"])
@pytest.mark.parametrize("reason", ["NO_KERNEL", "OUTPUT_ATTENTIONS"])
def test_a_fallback_keeps_packed_sequences_apart(tiny, how, reason, monkeypatch):
    eager = tiny.make("bert")
    ours = hf_flash.patch_model(tiny.make("bert"), on_fallback="ignore")
    keywords = {}
    if reason == "NO_KERNEL":
        monkeypatch.setattr("hf_flash.support.device_reason", lambda *a: ("NO_KERNEL", "none in this test"))
    else:
        keywords = {"output_attentions": True}
    got = ours(**packed_inputs(how), **keywords).logits
    assert (one_by_one(eager) - got).abs().max() < 1e-4
    assert hf_flash.explain(ours).reasons().keys() == {reason}


def test_t5_encoder_packs_its_bias(tiny):
    """T5 has no position_ids; cu_seq_lens keywords reach its encoder in releases that hand them on."""
    model = tiny.make("t5").get_encoder()
    ours = tiny.twin(tiny.make("t5")).get_encoder()
    inputs = packed_inputs("keywords")
    del inputs["position_ids"]
    want = torch.cat([model(input_ids=s)[0] for s in sequences()], 1)
    if not through_interface(type(model.block[0].layer[0].SelfAttention)):
        with pytest.raises(ValueError, match="PACKED"):  # a release that does not hand them on
            ours(**inputs)
        return
    got = ours(**inputs)[0]
    assert (want - got).abs().max() < 1e-5


def decoder_bert(tiny, **config):
    return tiny.make("bert", is_decoder=True, add_cross_attention=True, **config)


def test_cross_attention_refuses_packed_sequences(tiny):
    ours = hf_flash.patch_model(decoder_bert(tiny).bert)
    memory = torch.randn(1, 6, 32)
    for how in ("positions", "keywords"):
        with pytest.raises(ValueError, match="PACKED"):
            ours(**packed_inputs(how), encoder_hidden_states=memory)
    with pytest.raises(ValueError, match="PACKED"):
        inputs = packed_inputs("keywords")
        ours(**inputs, attention_mask=torch.tensor([[1] * 12 + [0]]))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_keywords_beside_a_mask_of_ones(tiny, fullgraph):
    """The collator gives none, a tokenizer may. Compiled code cannot look at it, and says so."""
    ours = tiny.twin(tiny.make("bert"))
    inputs = packed_inputs("keywords")
    want = ours(**inputs).logits
    mask = {"attention_mask": torch.ones_like(inputs["input_ids"])}
    assert torch.equal(ours(**inputs, **mask).logits, want)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=fullgraph)
    assert (compiled(**inputs).logits - want).abs().max() < 1e-5
    with pytest.raises(Exception, match=r"cannot be looked at under torch.compile; leave the mask out"):
        compiled(**inputs, **mask)


def test_keywords_for_a_padded_batch_are_refused(tiny):
    ours = tiny.twin(tiny.make("bert"))
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="batch of 2"):
        ours(input_ids=torch.ones(2, 4, dtype=torch.long), cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens)


def test_positions_that_are_no_packing_change_nothing(tiny):
    eager = tiny.make("bert")
    ours = tiny.twin(eager)
    ids = sequences()[2]
    for positions in ([3, 1, 2, 0, 5, 4, 6], [1, 1, 1, 0, 1, 2, 3], list(range(4, 11)), [0] * 7, [5] * 7):
        inputs = {"input_ids": ids, "position_ids": torch.tensor([positions])}
        assert (eager(**inputs).logits - ours(**inputs).logits).abs().max() < 1e-5


@pytest.mark.parametrize("positions", [[0] * 7, [0, 1, 2, 0, 1, 0, 0], [0, 0, 0, 1, 2, 3, 4], [4, 5, 6, 7, 8, 9, 10]])
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_positions_mean_what_they_mean_to_sdpa(tiny, name, positions):
    """Transformers reads packed sequences out of a causal model's positions itself, by a rule of its own."""
    sdpa, ours = tiny.make(name, "sdpa"), tiny.twin(tiny.make(name))
    encoder = tiny.models[name].kind == "encoder"
    inputs = {"input_ids": sequences()[2], "position_ids": torch.tensor([positions])}
    inputs |= {} if encoder else {"use_cache": False}
    want, got = sdpa(**inputs).logits, ours(**inputs).logits
    if encoder and positions.count(0) > 1 and 1 in positions:
        assert (want - got).abs().max() > 0.1  # there sdpa lets packed sequences see each other
    else:
        assert (want - got).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "distilbert"])
def test_restarting_positions_beside_a_full_mask_are_positions(tiny, name):
    """Transformers reads packed sequences out of positions only where no attention_mask is given."""
    model = tiny.make(name)
    ids = torch.arange(3, 12)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    wanted = model(**inputs).logits.detach()
    torch.testing.assert_close(
        tiny.twin(model)(**inputs).logits, wanted, rtol=1e-4, atol=float(1e-4 * wanted.abs().max())
    )


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_by_keywords_under_compile(tiny, use_cache):
    """With use_cache=False Transformers makes a mask of the packing itself, which compiled code cannot look into."""
    model, inputs = tiny.twin(tiny.make("llama")), packed_inputs("keywords") | {"use_cache": use_cache}
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits
    torch.testing.assert_close(got, model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["positions", "keywords"])
def test_packed_beside_another_sequence_is_refused(tiny, how):
    model = tiny.twin(tiny.make("gpt2", add_cross_attention=True))
    with pytest.raises(ValueError, match=r"\[PACKED\].*encoder_hidden_states.*padded batches"):
        model(**packed_inputs(how), encoder_hidden_states=torch.randn(1, 6, 32))


def test_a_forward_of_any_arguments(tiny):
    """What replaced a model's forward may name its arguments as it likes."""
    model = tiny.twin(tiny.make("distilbert"))
    want = model(**packed_inputs("positions")).logits
    forward = model.distilbert.forward
    model.distilbert.forward = lambda *a, **k: forward(*a, **k)
    assert torch.equal(model(**packed_inputs("positions")).logits, want)


def test_a_bound_beyond_all_tokens_beside_a_bias(tiny):
    """T5's bias has as many rows as there are tokens."""
    encoder = tiny.twin(tiny.make("t5")).encoder
    inputs = {key: value for key, value in packed_inputs("keywords").items() if key != "position_ids"}
    want = encoder(**inputs).last_hidden_state
    got = encoder(**inputs | {"max_length_q": 40, "max_length_k": 40}).last_hidden_state
    assert torch.equal(got, want)
