"""Which keys each query sees, for every small shape: with q = 0 and v the unit matrix, out is the row's weights."""

import itertools
import math

import pytest
import torch
from attention_rule import int32, visible_keys

from hf_flash import flash_attention

WINDOWS = [(-1, -1), (-1, 0), (0, 0), (2, -1), (-1, 1), (1, 2), (3, 0), (20, 20)]
SIZES = list(itertools.product(range(1, 10), repeat=2))


def weights(seqlen_q, seqlen_k, device, dtype, batch=1, **options):
    """The attention weights (B, Sq, Sk) of equal scores, and lse (B, Sq)."""
    zeros = (
        torch.zeros(batch, seqlen_q, 1, 8, device=device, dtype=dtype),
        torch.zeros(batch, seqlen_k, 1, 8, device=device, dtype=dtype),
    )
    unit = torch.eye(seqlen_k, -(-seqlen_k // 8) * 8, device=device, dtype=dtype)
    out, lse = flash_attention(*zeros, unit[None, :, None].expand(batch, -1, 1, -1), **options, return_lse=True)
    return out[:, :, 0, :seqlen_k], lse[:, 0]


def judge(got, lse, want):
    """want: for each batch entry and query the set of keys it sees."""
    for b, rows in enumerate(want):
        for i, keys in enumerate(rows):
            assert set(got[b, i].nonzero().flatten().tolist()) == keys, f"batch {b}, query {i}"
            expected = math.log(len(keys)) if keys else -math.inf
            assert lse[b, i].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows_at_every_small_shape(device, plain_dtype, window):
    for seqlen_q, seqlen_k in SIZES:
        got, lse = weights(seqlen_q, seqlen_k, device, plain_dtype, window=window)
        judge(got.cpu(), lse.cpu(), [visible_keys(seqlen_q, seqlen_k, seqlen_k - seqlen_q, window)])


def test_causal_is_bottom_right(device, plain_dtype):
    for seqlen_q, seqlen_k in SIZES:
        got, lse = weights(seqlen_q, seqlen_k, device, plain_dtype, causal=True, window=(2, 7))
        judge(got.cpu(), lse.cpu(), [visible_keys(seqlen_q, seqlen_k, seqlen_k - seqlen_q, (2, 0))])


def test_offsets_of_a_static_cache(device, plain_dtype):
    """Query 0 stands at any key, before the first and after the last included: one batch entry each."""
    for seqlen_q, seqlen_k in [(7, 8), (1, 9), (9, 3), (3, 3), (5, 70), (70, 5)]:
        offsets = [*list(range(-seqlen_q - 2, seqlen_k + 3)), 2**31 - 1, -(2**31)]
        for window in [(-1, 0), (2, 1), (0, 0)]:
            got, lse = weights(
                seqlen_q,
                seqlen_k,
                device,
                plain_dtype,
                len(offsets),
                query_offset=int32(offsets, device),
                window=window,
            )
            judge(got.cpu(), lse.cpu(), [visible_keys(seqlen_q, seqlen_k, offset, window) for offset in offsets])


def test_every_pair_of_ranges(device, plain_dtype):
    seqlen_q, seqlen_k = 4, 6
    key_ranges = [(a, b) for a in range(seqlen_k + 1) for b in range(a, seqlen_k + 1)]
    query_ranges = [(a, b) for a in range(seqlen_q + 1) for b in range(a, seqlen_q + 1)]
    pairs = list(itertools.product(key_ranges, query_ranges))
    for window in [(-1, -1), (-1, 0), (1, 1)]:
        got, lse = weights(
            seqlen_q, seqlen_k, device, plain_dtype, len(pairs), window=window,
            key_range=int32([p[0] for p in pairs], device), query_range=int32([p[1] for p in pairs], device),
        )  # fmt: skip
        want = [visible_keys(seqlen_q, seqlen_k, 2, window, keys, rows) for keys, rows in pairs]
        judge(got.cpu(), lse.cpu(), want)


def test_wrong_values_on_the_device_are_clamped(device, plain_dtype):
    ranges = [(-3, 4), (2, 99), (5, 2), (99, 120), (-9, -2), (-(2**31), 2**31 - 1)]
    got, lse = weights(5, 6, device, plain_dtype, len(ranges), key_range=int32(ranges, device))
    judge(got.cpu(), lse.cpu(), [visible_keys(5, 6, 1, (-1, -1), keys) for keys in ranges])
    got, lse = weights(5, 6, device, plain_dtype, len(ranges), query_range=int32(ranges, device), causal=True)
    judge(got.cpu(), lse.cpu(), [visible_keys(5, 6, 1, (-1, 0), (0, 6), rows) for rows in ranges])


def test_tile_edges(device, plain_dtype):
    """A window that slides over the edges of 16 to 128 wide tiles."""
    for seqlen_q, seqlen_k in [(130, 130), (65, 129), (129, 65)]:
        for window in [(0, 0), (15, 0), (16, 1), (63, 0), (64, 64), (-1, 31), (5, -1)]:
            got, lse = weights(seqlen_q, seqlen_k, device, plain_dtype, window=window)
            judge(got.cpu(), lse.cpu(), [visible_keys(seqlen_q, seqlen_k, seqlen_k - seqlen_q, window)])
