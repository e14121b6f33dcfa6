"""So many heads of q share one of k that Hopper's backward keeps key tiles within reach of each other (share_cache() in
csrc/sm90/backward_grid.h), or splits the heads into parts (csrc/attention/key_head_parts.h). Counted for 132
multiprocessors, which the key tiles fill (tests/build/test_key_head_parts.py).
"""

import pytest
import torch
from attention_rule import (
    check,
    check_poison_outside_ranges,
    int32,
    make_qkv,
    poison_freed_memory,
    run,
    seed_tensor,
)

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = {  # batch, seqlen_q, seqlen_k, heads_k
    "finishes dq": (11, 300, 400, 3),  # up to head dimension 128
    "takes turns": (7, 450, 700, 3),  # where the order is fixed
    "zeros are written ahead": (8, 520, 1000, 2),
    "many key tiles": (1, 700, 4200, 4),
}


def grouped(lengths, dtype, group, head_dim):
    batch, seqlen_q, seqlen_k, heads_k = LENGTHS[lengths]
    sizes = {"heads": group * heads_k, "heads_k": heads_k, "head_dim": head_dim}
    return make_qkv("cuda", dtype, batch, seqlen_q, seqlen_k, **sizes)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("head_dim, group, dtype", [(64, 8, BF16), (128, 8, FP16), (128, 5, BF16), (256, 7, FP16)])
def test_many_heads_share_one(head_dim, group, lengths, deterministic, dtype):
    poison_freed_memory()
    q, k, v = grouped(lengths, dtype, group, head_dim)
    check(q, k, v, deterministic=deterministic)
    check(q, k, v, deterministic=deterministic, causal=True)


FEW_TILES = {  # batch, seqlen_q, seqlen_k, heads, heads_k
    "a head of k": (1, 300, 1100, 12, 1),
    "seven share one": (2, 650, 777, 14, 2),
    "a prime number": (3, 200, 260, 17, 1),
    "one tile": (2, 500, 100, 8, 2),
}


@pytest.mark.parametrize("shape", FEW_TILES)
@pytest.mark.parametrize(
    "head_dim, head_dim_v, dtype",
    [(64, 64, BF16), (128, 128, FP16), (40, 72, FP16), (256, 256, BF16), (200, 136, FP16)],
)
def test_heads_split_into_parts(head_dim, head_dim_v, shape, dtype):
    poison_freed_memory()
    batch, seqlen_q, seqlen_k, heads, heads_k = FEW_TILES[shape]
    sizes = {"heads": heads, "heads_k": heads_k, "head_dim": head_dim, "head_dim_v": head_dim_v}
    q, k, v = make_qkv("cuda", dtype, batch, seqlen_q, seqlen_k, **sizes)
    check(q, k, v, causal=True)
    check(q, k, v, window=(100, 50), deterministic=True)
    bias = torch.randn(1, heads, seqlen_q, seqlen_k, device="cuda", dtype=dtype)
    options = {"bias": bias, "dropout_p": 0.2, "dropout_seed": seed_tensor(4, "cuda")}
    check(q, k, v, alibi_slopes=torch.linspace(0.01, 0.1, heads, device="cuda"), softcap=30.0, **options)


@pytest.mark.parametrize("head_dim, dtype", [(64, FP16), (128, BF16), (256, BF16)])
def test_parts_of_packed_batches_and_ranges(head_dim, dtype):
    """Rows of no sequence get zeros, and keys outside the ranges, whatever stood in the memory of the parts."""
    poison_freed_memory()
    q, k, v = make_qkv("cuda", dtype, None, 700, 900, heads=12, heads_k=1, head_dim=head_dim)
    starts = {
        "cu_seqlens_q": int32([0, 300, 300, 317, 650], "cuda"),
        "cu_seqlens_k": int32([0, 310, 500, 517, 850], "cuda"),
        "max_seqlen_q": 333,
        "max_seqlen_k": 333,
    }
    for causal in (False, True):
        results = check(q, k, v, causal=causal, **starts)
        assert not results["dk"][850:].any() and not results["dv"][850:].any()
    ranges = {
        "key_range": int32([[0, 300], [133, 401], [7, 7]], "cuda"),
        "query_range": int32([[0, 200], [85, 390], [0, 390]], "cuda"),
    }
    q, k, v = make_qkv("cuda", dtype, 3, 390, 401, heads=8, heads_k=1, head_dim=head_dim)
    check_poison_outside_ranges(q, k, v, {**ranges, "causal": True, "deterministic": True})


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("lengths", ["finishes dq", "takes turns"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dropout_and_ranges(head_dim, lengths, deterministic):
    """Each sequence has a number of key tiles and steps of its own, one of them none."""
    q, k, v = grouped(lengths, torch.bfloat16, 8, head_dim)
    batch, longest = q.shape[0], k.shape[1]
    options = {"dropout_p": 0.1, "dropout_seed": seed_tensor(3, "cuda"), "deterministic": deterministic}
    check(q, k, v, **options)
    ends = [longest, 0, 1, 129, 256, longest - 1]
    ranges = [[0, ends[b % 6]] for b in range(batch)]
    check(q, k, v, key_range=int32(ranges, "cuda"), small=True, **options)  # one sees a single key
    rows = [[0, 200], [64, 300], [128, 129], [0, 300], [250, 300], [10, 10]]
    check(q, k, v, query_range=int32([rows[b % 6] for b in range(batch)], "cuda"), small=True, **options)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_fixed_order_gives_the_same_bits(head_dim, lengths):
    q, k, v = grouped(lengths, torch.bfloat16, 8, head_dim)
    dout = torch.randn_like(q)
    for causal in (False, True):
        options = {"deterministic": True, "causal": causal}
        first = run(q, k, v, options, dout=dout)
        for _ in range(5):
            again = run(q, k, v, options, dout=dout)
            assert all(torch.equal(again[name], first[name]) for name in ("dq", "dk", "dv"))
