"""Short calls whose dQ is summed from CTA to CTA of a cluster (csrc/sm90/dq_relay.cuh): two to four tiles of keys."""

import re

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
from served_kernels import ON_HOPPER, kernels_of

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
SHAPES = {  # batch, seqlen_q, seqlen_k, heads, heads_k
    "two tiles": (2, 256, 256, 48, 48),  # several heads a cluster
    "three tiles": (3, 300, 257, 40, 40),
    "four tiles": (2, 512, 500, 24, 24),
    "more queries": (2, 777, 390, 6, 6),  # rounds of as many query tiles as there are key tiles, the last one shorter
    "shared heads": (2, 130, 450, 12, 3),
    "one head": (1, 129, 200, 1, 1),
}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (128, 128), (40, 24), (72, 104)])
def test_short_calls(dtype, head_dim, head_dim_v, shape):
    poison_freed_memory()
    batch, seqlen_q, seqlen_k, heads, heads_k = SHAPES[shape]
    sizes = {"heads": heads, "heads_k": heads_k, "head_dim": head_dim, "head_dim_v": head_dim_v}
    check(*make_qkv("cuda", dtype, batch, seqlen_q, seqlen_k, **sizes))


@DTYPES
@pytest.mark.parametrize("seqlen", [129, 200, 256])
def test_dropout(dtype, seqlen):
    options = {"dropout_p": 0.1, "dropout_seed": seed_tensor(5, "cuda")}
    check(*make_qkv("cuda", dtype, 3, seqlen, seqlen, heads=30, head_dim=64), **options)


def ragged(kind):
    """Sequences of two tiles, of one, of none, and such whose first tile nobody sees; so other CTAs begin and end."""
    if kind == "ranges":
        keys = [[0, 256], [130, 250], [100, 140], [7, 7], [0, 1], [0, 256], [255, 256]]
        queries = [[0, 256], [0, 256], [120, 200], [0, 256], [5, 256], [9, 9], [0, 129]]
        return (7, 256, 256), {"key_range": int32(keys, "cuda"), "query_range": int32(queries, "cuda")}
    starts_q, starts_k = [0, 256, 300, 300, 500, 700, 701], [0, 250, 506, 600, 601, 700, 940]
    packed = {"cu_seqlens_q": int32(starts_q, "cuda"), "cu_seqlens_k": int32(starts_k, "cuda")}
    return (None, 701, 940), {**packed, "max_seqlen_q": 256, "max_seqlen_k": 256}


@DTYPES
@pytest.mark.parametrize("kind", ["ranges", "packed"])
@pytest.mark.parametrize("head_dim, dropout_p", [(64, 0.0), (64, 0.1), (128, 0.0)])
def test_ragged_sequences(dtype, head_dim, dropout_p, kind):
    shape, options = ragged(kind)
    if dropout_p:
        options |= {"dropout_p": dropout_p, "dropout_seed": seed_tensor(5, "cuda")}
    check(*make_qkv("cuda", dtype, *shape, heads=36, heads_k=12, head_dim=head_dim), **options)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen_k", [200, 300, 512])
def test_pieces_of_work_of_few_steps(dtype, head_dim, seqlen_k):
    """Several heads a cluster, of which a CTA has one query tile, or none, or as many as there are key tiles."""
    rows = [[0, 64], [100, 180], [7, 7], [64, 65], [0, 512], [130, 131], [300, 300], [500, 512]]
    q, k, v = make_qkv("cuda", dtype, len(rows), 512, seqlen_k, heads=20, head_dim=head_dim)
    check(q, k, v, query_range=int32(rows, "cuda"))
    if seqlen_k <= 256:
        keys = [[0, 200], [130, 200], [0, 200], [0, 128], [100, 140], [0, 200], [7, 7], [199, 200]]
        check(q, k, v, query_range=int32(rows, "cuda"), key_range=int32(keys, "cuda"))


def test_ranges_keep_poison_out():
    shape, options = ragged("ranges")
    q, k, v = make_qkv("cuda", torch.float16, *shape, heads=4, head_dim=64)
    check_poison_outside_ranges(q, k, v, options)


@pytest.mark.architectures("sm90")
@pytest.mark.parametrize(
    "seqlen, head_dim, dropout_p", [(256, 64, 0.1), (256, 64, 0.0), (512, 64, 0.0), (384, 128, 0.0)]
)
def test_the_order_is_fixed_without_asking_for_it(seqlen, head_dim, dropout_p):
    """As many repeats as would show a sum read before it came."""
    options = {"dropout_p": dropout_p, "dropout_seed": seed_tensor(5, "cuda")}
    q, k, v = make_qkv("cuda", torch.bfloat16, 6, seqlen, seqlen, heads=40, head_dim=head_dim)
    first = run(q, k, v, options)
    for _ in range(250):
        again = run(q, k, v, options)
        assert all(torch.equal(first[name], again[name]) for name in first)


@ON_HOPPER
@pytest.mark.architectures("default")
@pytest.mark.parametrize(
    "seqlen, head_dim, options, relays",
    [
        (129, 64, {}, True), (512, 128, {}, True), (256, 64, {"dropout_p": 0.1}, True),
        (384, 64, {"dropout_p": 0.1}, False), (256, 128, {"dropout_p": 0.1}, False),
        (128, 64, {}, False), (513, 64, {}, False), (256, 64, {"causal": True}, False),
    ],
)  # fmt: skip
def test_which_kernel_serves(seqlen, head_dim, options, relays):
    q, k, v = make_qkv("cuda", torch.float16, 2, seqlen, seqlen, heads=4, head_dim=head_dim)
    arguments = r"BackwardTraits<__half, \d+, \w+, [^,]+, \d+, (\w+), \w+>"
    found = [re.search(arguments, name) for name in kernels_of(run, q, k, v, options)]
    assert [match[1] for match in found if match] == [str(relays).lower()]
