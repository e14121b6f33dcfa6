"""What a caller can get wrong, told where it happens: masks of other sizes, arguments and models of other types."""

import copy

import pytest
import torch
import transformers

import hf_flash


@pytest.mark.parametrize("name", ["bert", "distilbert", "t5", "bart"])
def test_masks_of_other_sizes_are_refused(tiny, name):
    """Filled with hidden keys or cut in silence, they would change what is attended to."""
    model = hf_flash.patch_model(tiny.make(name))
    inputs = tiny.batch(name, "right")
    mask = inputs["attention_mask"]
    for wrong, said in (
        (mask[:, :-4], "9 columns, but there are 13 keys"),
        (torch.cat([mask, mask], 1), "26 columns"),
        (mask[:2], r"shape \(2, 13\), but there are 3 sequences"),
        (mask[0], r"shape \(13,\)"),
        (mask[:, None].expand(3, 13, 13), r"shape \(3, 13, 13\)"),
    ):
        with pytest.raises(ValueError, match=rf"hf_flash \[MASK\]: attention_mask .*{said}"):
            model(**inputs | {"attention_mask": wrong})


def test_masks_as_long_as_a_static_cache(tiny):
    """Causal models take them, and hide what is not there yet by position."""
    eager = tiny.make("llama")
    ours = hf_flash.patch_model(copy.deepcopy(eager), on_fallback="error")
    ids, mask = tiny.batch("llama", "none")["input_ids"], torch.ones(3, 20, dtype=torch.long)
    want, got = (
        model(ids, attention_mask=mask, past_key_values=transformers.StaticCache(model.config, max_cache_len=20)).logits
        for model in (eager, ours)
    )
    assert (want - got).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"padding_free": "False"}, "`padding_free` is 'False'; it must be True or False"),
        ({"deterministic": "no"}, "`deterministic` is 'no'"),
        ({"include": 3}, "include or exclude is 3; it must be a glob pattern"),
        ({"exclude": [3]}, "include or exclude is"),
    ],
)
def test_arguments_of_another_type_are_refused(tiny, arguments, said):
    with pytest.raises(TypeError, match=said):
        hf_flash.patch_model(tiny.make("bert"), **arguments)
    if "include" not in arguments and "exclude" not in arguments:
        with pytest.raises(TypeError, match=said):
            hf_flash.FlashAttentionCallback(**arguments)


def test_what_is_no_model_is_refused():
    def enter(model):
        with hf_flash.patched(model):
            pass

    for function in (hf_flash.patch_model, hf_flash.unpatch_model, hf_flash.explain, hf_flash.is_patched, enter):
        for given in ("bert-base-uncased", None):
            with pytest.raises(TypeError, match=r"`model` is a (str|NoneType); .*from_pretrained"):
                function(given)
