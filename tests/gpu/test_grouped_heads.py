"""So many heads of q share one of k that Hopper's backward keeps key tiles within reach of each other (share_cache() in
csrc/sm90/backward_grid.h). Counted for 132 multiprocessors; with more the reach is shorter still.
"""

import pytest
import torch
from attention_rule import check, int32, make_qkv, poison_freed_memory, run, seed_tensor

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
LENGTHS = {  # batch, seqlen_q, seqlen_k, heads_k
    "finishes dq": (12, 300, 400, 3),  # with dropout at every head dimension up to 128
    "takes turns": (6, 450, 700, 3),  # where the order is fixed
    "first addition stores": (6, 520, 1000, 3),
    "sums are zeroed": (2, 700, 4500, 2),
}


def grouped(lengths, dtype, group, head_dim):
    batch, seqlen_q, seqlen_k, heads_k = LENGTHS[lengths]
    sizes = {"heads": group * heads_k, "heads_k": heads_k, "head_dim": head_dim}
    return make_qkv("cuda", dtype, batch, seqlen_q, seqlen_k, **sizes)


@DTYPES
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("head_dim, group", [(64, 8), (128, 8), (128, 5), (256, 7)])
def test_many_heads_share_one(head_dim, group, lengths, deterministic, dtype):
    poison_freed_memory()
    q, k, v = grouped(lengths, dtype, group, head_dim)
    check(q, k, v, deterministic=deterministic)
    check(q, k, v, deterministic=deterministic, causal=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("lengths", ["finishes dq", "takes turns"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dropout_and_ranges(head_dim, lengths, deterministic):
    """Each sequence has a number of key tiles and steps of its own, one of them none."""
    q, k, v = grouped(lengths, torch.bfloat16, 8, head_dim)
    batch, longest = q.shape[0], k.shape[1]
    options = {"dropout_p": 0.1, "dropout_seed": seed_tensor(3, "cuda"), "deterministic": deterministic}
    check(q, k, v, **options)
    ends = [longest, 0, 1, 129, 256, longest - 1][: min(batch, 6)]
    ranges = [[0, ends[b % len(ends)]] for b in range(batch)]
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
