"""Padding masks as ranges, positions as sequences, sequences as cu_seqlens: without Transformers."""

import itertools

import torch

from hf_flash.packing import Packing, Visibility, key_ranges, packing_from_cu_seqlens, packing_from_ids, sequence_ids


def test_key_ranges_of_all_masks_of_six_keys():
    rows = torch.tensor(list(itertools.product([False, True], repeat=6)))
    for row in rows:
        padding = row[None]
        ranges, mask = key_ranges(padding)
        if row.all():
            assert ranges is None and mask is None
            continue
        j = torch.arange(6)
        visible = (j >= ranges[0, 0]) & (j < ranges[0, 1])
        places = row.nonzero().flatten()
        contiguous = len(places) == 0 or places[-1] - places[0] + 1 == len(places)
        assert (mask is None) == contiguous
        visible = visible if mask is None else visible & mask[0, 0, 0]
        assert torch.equal(visible, row)
        assert ranges.dtype == torch.int32 and ranges.shape == (1, 2)


def test_one_row_with_a_hole_keeps_the_others_right():
    padding = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1]]).bool()
    ranges, mask = key_ranges(padding)
    assert ranges.tolist() == [[0, 2], [0, 3], [1, 4]] and torch.equal(mask[:, 0, 0], padding)


def test_off_the_cpu_nothing_is_read_back():
    """A tensor without data would raise where somebody asked for a value."""
    padding = torch.ones(2, 5, dtype=torch.bool, device="meta")
    ranges, mask = key_ranges(padding)
    assert ranges.shape == (2, 2) and ranges.dtype == torch.int32 and mask.shape == (2, 1, 1, 5)


def test_what_hides_keys():
    keys = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    padding = keys.clone()
    padding[1, ..., 3:] = False
    ranges = torch.tensor([[0, 4], [0, 3]], dtype=torch.int32)
    all_keys = torch.tensor([[0, 4], [0, 4]], dtype=torch.int32)
    assert not Visibility(2, 4, 4).hides_keys() and not Visibility(2, 4, 4, mask=keys, key_range=all_keys).hides_keys()
    assert Visibility(2, 4, 4, mask=keys, key_range=ranges).hides_keys()
    assert Visibility(2, 4, 4, mask=padding, key_range=ranges).hides_keys()
    assert Visibility(2, 4, 4, key_range=ranges).hides_keys()
    assert Visibility(2, 4, 4, mask=torch.ones(2, 1, 4, 4, dtype=torch.bool)).hides_keys()  # nobody looks through it
    assert Visibility(2, 4, 4, mask=keys, key_range=all_keys).is_plain(4, 4) == "full"
    assert Visibility(2, 4, 4, mask=padding, key_range=ranges).is_plain(4, 4) is None


def test_sequence_ids():
    def ids(*positions):
        return sequence_ids(torch.tensor([positions])).tolist()[0]

    assert ids(0, 1, 2, 0, 1, 0) == [0, 0, 0, 1, 1, 2]
    assert ids(2, 3, 4, 2, 3) == [0, 0, 0, 1, 1]  # RoBERTa counts from padding_idx + 1
    assert ids(0, 0, 0) == ids(3, 3, 3) == [0, 0, 0]  # constant: no packing
    assert ids(0, 0, 0, 1) == [0, 1, 2, 2]
    assert ids(0, 1, 2, 3) == [0, 0, 0, 0]
    assert ids(3, 1, 2, 0) == [0, 0, 0, 0]  # shuffled: no packing
    assert ids(1, 1, 0, 1, 2) == [0, 0, 0, 0, 0]  # left padding, as generate() fills it
    assert ids(7) == [0]


def test_packing_from_ids_separates_batch_rows():
    packing = packing_from_ids(torch.tensor([[0, 0, 1], [1, 1, 1]]))
    assert packing.cu_seqlens_q.tolist() == [0, 2, 3, 6]
    assert packing.max_seqlen_q == packing.max_seqlen_k == 3
    assert packing.cu_seqlens_q.dtype == torch.int32


def test_packing_from_keywords():
    cu = torch.tensor([0, 3, 7])
    packing = packing_from_cu_seqlens(cu, cu)
    assert packing.cu_seqlens_q is packing.cu_seqlens_k and packing.cu_seqlens_q.dtype == torch.int32
    assert (packing.max_seqlen_q, packing.max_seqlen_k) == (4, 4)
    packing = packing_from_cu_seqlens(cu, torch.tensor([0, 5, 9]), 4, torch.tensor(5))
    assert packing.max_seqlen_k == 5 and packing.cu_seqlens_k.tolist() == [0, 5, 9]


def test_packing_dense():
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    dense = Packing(cu, cu, 3, 3).dense(1, 5, 5)
    number = torch.tensor([0, 0, 1, 1, 1])
    assert torch.equal(dense[0, 0], number[:, None] == number)


def test_positions_are_read_once_per_forward_pass():
    visible = Visibility(1, 5, 5, window=(-1, 0), unpadded=True)
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    first = visible.packed_by(positions)
    assert first is not visible and visible.packed_by(positions) is first
    assert first.packing() is first.packing()
    assert first.arguments(1, 5, 5, "cpu")["cu_seqlens_q"].tolist() == [0, 2, 5]
    assert visible.packed_by(torch.arange(5)[None]) is visible


def test_more_keys_than_the_mask_has_columns():
    """A static cache hands over all its places; those beyond the mask are never seen."""
    visible = Visibility(2, 1, 4, window=(-1, -1))
    assert visible.arguments(2, 1, 6, "cpu")["key_range"].tolist() == [[0, 4], [0, 4]]
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]).bool()[:, None, None]
    filled = Visibility(2, 1, 4, mask=mask).arguments(2, 1, 6, "cpu")["mask"]
    assert filled.shape[-1] == 6 and not filled[..., 4:].any()
    assert torch.equal(Visibility(2, 1, 4).dense(2, 1, 6, "cpu")[0, 0, 0], torch.arange(6) < 4)


def test_a_mask_of_another_batch_is_refused():
    visible = Visibility(3, 4, 4, key_range=torch.tensor([[0, 4], [0, 3], [0, 2]], dtype=torch.int32))
    try:
        visible.arguments(2, 4, 4, "cpu")
    except ValueError as error:
        assert "3 sequences" in str(error) and "2 sequences" in str(error)
    else:
        raise AssertionError("a mask of 3 sequences was taken for 2")


def test_moving_to_a_device_keeps_everything():
    visible = Visibility(
        2, 3, 3, window=(1, 0), query_offset=torch.tensor(0), key_range=torch.tensor([[0, 3], [1, 3]]).int()
    )
    assert visible.to("cpu") is visible
    moved = visible.to("meta")
    assert moved.key_range.device.type == "meta" and moved.window == (1, 0) and moved.shape == (2, 1, 3, 3)


def test_a_packing_of_more_keys_than_queries_counts_within_sequences():
    """Each sequence's last query stands at its last key, as in flash_attention."""
    packing = packing_from_cu_seqlens(torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 5, 9]))
    visible = Visibility(1, 6, 10, window=(2, 0), packing=packing).dense(1, 6, 10, "cpu")[0, 0]
    wanted = torch.zeros(6, 10, dtype=torch.bool)
    for first_q, last_q, first_k, last_k in ((0, 2, 0, 4), (2, 5, 5, 9)):
        for i, j in itertools.product(range(first_q, last_q), range(first_k, last_k)):
            wanted[i, j] = 0 <= (last_k - last_q + i) - j <= 2
    assert torch.equal(visible[:5, :9], wanted[:5, :9])


def test_an_explicit_packing_moves_too():
    cu = torch.tensor([0, 2, 5])
    visible = Visibility(1, 5, 5, window=(-1, 0), packing=packing_from_cu_seqlens(cu, cu))
    assert visible.device == torch.device("cpu")
    assert visible.to("meta").packing().cu_seqlens_q.device.type == "meta"
