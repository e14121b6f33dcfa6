"""Every mask function, cache, padding and length up to 9: what we tell the kernel equals Transformers' own mask."""

import inspect
import itertools

import pytest
import torch
from transformers import DynamicCache
from transformers import masking_utils as masking

from hf_flash.masks import make_mask, recognise
from hf_flash.packing import Visibility, key_ranges

NEWER = "q_length" in inspect.signature(masking.sdpa_mask).parameters  # transformers 5.0 passes cache_position instead
BATCH = 3


def lengths():
    return itertools.product(range(1, 10), range(1, 10))


def paddings(columns):
    """2D masks of ``columns`` keys: none, full, right, left, with holes, and one with an empty row."""
    full = torch.ones(BATCH, columns, dtype=torch.bool)
    right, left, holes, empty = full.clone(), full.clone(), full.clone(), full.clone()
    for b in range(BATCH):
        right[b, max(1, columns - 2 * b) :] = False
        left[b, : min(columns - 1, 2 * b)] = False
        holes[b, 1 + b :: 3] = False
    empty[1] = False
    return {"none": None, "full": full, "right": right, "left": left, "holes": holes, "empty": empty}


FUNCTIONS = {
    "causal": masking.causal_mask_function,
    "bidirectional": masking.bidirectional_mask_function,
    "window 1": masking.sliding_window_causal_mask_function(1),
    "window 3": masking.sliding_window_causal_mask_function(3),
    "chunked": masking.chunked_causal_mask_function(3, torch.zeros(BATCH, dtype=torch.long)),
    "prefix": masking.or_masks(masking.causal_mask_function, lambda b, h, q, k: k < 2),
    "first key": masking.and_masks(masking.causal_mask_function, lambda b, h, q, k: k != 1),
}
if hasattr(masking, "sliding_window_bidirectional_mask_function"):
    FUNCTIONS["two-sided 0"] = masking.sliding_window_bidirectional_mask_function(0)
    FUNCTIONS["two-sided 2"] = masking.sliding_window_bidirectional_mask_function(2)
RANGES = ("causal", "bidirectional", "window 1", "window 3", "two-sided 0", "two-sided 2")  # these need no dense mask


def position_arguments(q_length, q_offset):
    if NEWER:
        return {"q_length": q_length, "q_offset": q_offset, "device": "cpu"}
    return {"cache_position": torch.arange(q_length) + q_offset}


def both_masks(function, q_length, kv_length, q_offset, kv_offset, padding):
    """Ours as the dense mask of the arguments that the kernel would get, ours by Visibility.dense, and upstream's."""
    common = dict(
        batch_size=BATCH, kv_length=kv_length, kv_offset=kv_offset, mask_function=function, attention_mask=padding,
        **position_arguments(q_length, q_offset),
    )  # fmt: skip
    theirs = masking.sdpa_mask(**common, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    ours = make_mask(**common)
    assert isinstance(ours, Visibility)
    dense = ours.dense(BATCH, q_length, kv_length, torch.device("cpu")).expand(BATCH, 1, q_length, kv_length)
    return expand(ours.arguments(BATCH, q_length, kv_length, "cpu"), q_length, kv_length), dense, theirs, ours


def expand(call, q_length, k_length):
    """flash_attention's keywords as a dense mask, from its documentation."""
    i, j = torch.arange(q_length).view(1, 1, -1, 1), torch.arange(k_length).view(1, 1, 1, -1)
    offset = call["query_offset"].view(-1, 1, 1, 1) if "query_offset" in call else k_length - q_length
    distance = j - i - offset
    left, right = call.get("window", (-1, -1))
    visible = torch.ones(BATCH, 1, q_length, k_length, dtype=torch.bool)
    visible &= (distance >= -left) if left >= 0 else True
    visible &= (distance <= right) if right >= 0 else True
    if "key_range" in call:
        begin, end = call["key_range"].view(-1, 2, 1, 1, 1).unbind(1)
        visible &= (j >= begin) & (j < end)
    return visible & call["mask"] if "mask" in call else visible


def slow_expand(call, q_length, k_length):
    """flash_attention's keywords as a dense mask, element by element."""
    visible = torch.ones(BATCH, 1, q_length, k_length, dtype=torch.bool)
    left, right = call.pop("window", (-1, -1))
    key_range, offset = call.pop("key_range", None), call.pop("query_offset", None)
    mask = call.pop("mask", None)
    assert not call
    for b, i, j in itertools.product(range(BATCH), range(q_length), range(k_length)):
        distance = j - (i + (k_length - q_length if offset is None else int(offset[b])))
        if (left >= 0 and distance < -left) or (right >= 0 and distance > right):
            visible[b, 0, i, j] = False
        if key_range is not None and not key_range[b, 0] <= j < key_range[b, 1]:
            visible[b, 0, i, j] = False
    return visible if mask is None else visible & mask


@pytest.mark.parametrize("name", FUNCTIONS)
def test_mask_equals_sdpa_mask(name):
    for q_length, kv_length in lengths():
        # no cache, a growing cache, a static cache with free places, a sliding cache whose keys start later
        offsets = {(0, 0), (kv_length - q_length, 0), (kv_length // 2, 0), (kv_length - q_length + 2, 2)}
        for q_offset, kv_offset in offsets:
            if q_offset < 0:
                continue
            columns = {q_offset + q_length, kv_length + kv_offset}
            for column in columns:
                for side, padding in paddings(column).items():
                    arguments, dense, theirs, ours = both_masks(
                        FUNCTIONS[name], q_length, kv_length, q_offset, kv_offset, padding
                    )
                    where = f"{name} Sq {q_length} Sk {kv_length} offsets {q_offset} {kv_offset} {side} {column}"
                    assert torch.equal(arguments, theirs), where
                    assert torch.equal(dense, theirs), where
                    if name in RANGES and side != "holes":
                        assert ours.mask is None, f"{where} needs no dense mask"


def test_expansion_agrees_with_the_slow_one():
    for q_length, kv_length in [(1, 1), (3, 5), (5, 3), (4, 4), (7, 8)]:
        for side, padding in paddings(kv_length).items():
            for name in RANGES:
                if name in FUNCTIONS:
                    call = make_mask(
                        batch_size=BATCH, kv_length=kv_length, mask_function=FUNCTIONS[name], attention_mask=padding,
                        **position_arguments(q_length, 0),
                    ).arguments(BATCH, q_length, kv_length, "cpu")  # fmt: skip
                    slow, fast = slow_expand(dict(call), q_length, kv_length), expand(call, q_length, kv_length)
                    assert torch.equal(slow, fast), (side, name)


def test_static_cache_prefill_sees_no_future():
    """7 queries, 8 places, offset 0: bottom-right alignment would show each query one key too many."""
    arguments, _, theirs, _ = both_masks(masking.causal_mask_function, 7, 8, 0, 0, torch.ones(BATCH, 7).bool())
    assert torch.equal(arguments, theirs)
    assert not arguments[0, 0, 0, 1]


def test_static_cache_offset_on_the_device():
    """A tensor offset (static caches) is used without reading it."""
    kwargs = position_arguments(1, 0)
    kwargs |= {"q_offset": torch.tensor(4)} if NEWER else {"cache_position": torch.tensor([4])}
    ours = make_mask(batch_size=BATCH, kv_length=9, mask_function=masking.causal_mask_function, **kwargs)
    assert torch.equal(expand(ours.arguments(BATCH, 1, 9, "cpu"), 1, 9)[0, 0, 0], torch.arange(9) <= 4)
    ours.query_offset = torch.tensor(4)
    assert torch.equal(expand(ours.arguments(BATCH, 1, 9, "cpu"), 1, 9)[0, 0, 0], torch.arange(9) <= 4)


@pytest.mark.parametrize("window", [None, 2])
def test_packed_overlay_equals_sdpa_mask(window):
    """Restarting positions, as create_causal_mask hands them over, for one row and for several."""
    base = masking.causal_mask_function
    if window:
        base = masking.sliding_window_causal_mask_function(window)
    for positions in ([[0, 1, 2, 0, 1, 0, 0, 1]], [[0, 1, 2, 3, 0, 1, 2, 0], [5, 6, 0, 1, 2, 3, 4, 0]]):
        positions = torch.tensor(positions)
        batch, length = positions.shape
        ids = masking.find_packed_sequence_indices(positions)
        if hasattr(masking, "packed_sequence_compatibility_function"):
            function = masking.packed_sequence_compatibility_function(base, positions, ids)
        else:
            function = masking.and_masks(base, masking.packed_sequence_mask_function(ids))
        common = dict(batch_size=batch, kv_length=length, mask_function=function, **position_arguments(length, 0))
        theirs = masking.sdpa_mask(**common, allow_is_causal_skip=False)
        ours = make_mask(**common)
        call = ours.arguments(batch, length, length, "cpu")
        assert "mask" not in call and call["max_seqlen_q"] == int(call["cu_seqlens_q"].diff().max())
        number = torch.searchsorted(call["cu_seqlens_q"], torch.arange(batch * length), right=True).view(batch, length)
        distance = torch.arange(length) - torch.arange(length)[:, None]
        same = (number[:, :, None] == number[:, None, :]) & (distance <= call["window"][1])
        same &= distance >= -call["window"][0] if call["window"][0] >= 0 else True
        assert torch.equal(same[:, None], theirs)
        assert torch.equal(ours.dense(batch, length, length, torch.device("cpu")), theirs)


def test_unknown_functions_are_not_taken_for_known_ones():
    assert recognise(lambda b, h, q, k: k <= q) is None
    assert recognise(masking.or_masks(masking.causal_mask_function, masking.bidirectional_mask_function)) is None
    assert recognise(masking.and_masks(masking.causal_mask_function, lambda b, h, q, k: k < 2)) is None
    assert recognise(masking.causal_mask_function) == ((-1, 0), None)
    assert recognise(masking.sliding_window_causal_mask_function(4)) == ((3, 0), None)


def test_shifted_window_would_be_seen():
    """The comparison above can fail: a window moved by one differs somewhere."""
    function = masking.sliding_window_causal_mask_function(3)
    ours = make_mask(batch_size=BATCH, kv_length=6, mask_function=function, **position_arguments(6, 0))
    theirs = masking.sdpa_mask(
        batch_size=BATCH, kv_length=6, mask_function=function, allow_is_causal_skip=False, **position_arguments(6, 0)
    )
    for window in [(1, 0), (3, 0), (2, 1)]:
        ours.window = window
        assert not torch.equal(expand(ours.arguments(BATCH, 6, 6, "cpu"), 6, 6), theirs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["bert", "electra", "roberta"])
def test_keys_of_a_prefix(tiny, name, masked):
    """Prefix tuning puts a cache in front of an encoder, which makes its mask without knowing of it."""

    def run(attention):
        model, cache, generator = tiny.make(name, attention), DynamicCache(), torch.Generator().manual_seed(3)
        prefix = [torch.randn(3, 4, 5, 8, generator=generator).requires_grad_() for _ in range(4)]
        for layer in range(2):
            cache.update(*prefix[2 * layer : 2 * layer + 2], layer)
        mask = torch.ones(3, 18, dtype=torch.long) if masked else None
        out = model(tiny.batch(name)["input_ids"], attention_mask=mask, past_key_values=cache).logits
        return out.detach(), *torch.autograd.grad(out.square().sum(), prefix)

    for want, got in zip(run("eager"), run("hf_flash"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max())


def test_fake_tensors_of_padding_are_not_read():
    with torch._subclasses.FakeTensorMode():
        ranges, mask = key_ranges(torch.ones(2, 7, dtype=torch.bool))
    assert ranges.shape == (2, 2) and mask.shape == (2, 1, 1, 7)


def test_adding_a_mask_to_scores_says_what_is_wrong():
    with pytest.raises(TypeError, match=r"hf_flash \[MODEL\].*adds its mask to its scores"):
        torch.zeros(1, 1, 4, 4) + make_mask(1, 4, 4)
