"""Calls of head dimensions over 128, whose pieces of work two CTAs share (csrc/sm90/paired_backward.cuh)."""

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


@DTYPES
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["plain", "causal", "window", "packed"])
@pytest.mark.parametrize("head_dim, head_dim_v", [(136, 136), (256, 256), (192, 168), (40, 200), (248, 64)])
def test_heads_over_128(dtype, head_dim, head_dim_v, kind, deterministic):
    """Lengths that end within a tile, masks, shared heads, several pieces of work a pair."""
    poison_freed_memory()
    shape, heads = ((None, 1900, 2300), 8) if kind == "packed" else ((3, 333, 577), 24)
    sizes = {"heads": heads, "heads_k": heads // 2, "head_dim": head_dim, "head_dim_v": head_dim_v}
    q, k, v = make_qkv("cuda", dtype, *shape, **sizes)
    options = {"causal": {"causal": True}, "window": {"window": (70, 130)}}
    options["packed"] = {
        "cu_seqlens_q": int32([0, 700, 701, 781, 781, 1900], "cuda"),
        "cu_seqlens_k": int32([0, 900, 1000, 1001, 1150, 2300], "cuda"),
        "max_seqlen_q": 1119,
        "max_seqlen_k": 1150,
        "causal": True,
    }
    check(q, k, v, deterministic=deterministic, **options.get(kind, {}))


@pytest.mark.parametrize("head_dim", [192, 256])
@pytest.mark.parametrize("seqlen_k", [60, 128, 130, 400])
def test_pieces_of_work_of_few_steps(head_dim, seqlen_k):
    """More of them than pairs, many of a single step or of none, in any order of length."""
    rows = [[0, 64], [100, 180], [7, 7], [64, 65], [0, 512], [130, 131], [300, 300], [500, 512]]
    q, k, v = make_qkv("cuda", torch.bfloat16, len(rows), 512, seqlen_k, heads=20, head_dim=head_dim)
    query_range = int32(rows, "cuda")
    keys = [[0, 60], [30, 60], [0, 60], [0, 58], [10, 14], [0, 60], [7, 7], [59, 60]]
    for options in ({}, {"deterministic": True}, {"key_range": int32(keys, "cuda")}, {"window": (60, 60)}):
        check(q, k, v, query_range=query_range, **options, small=True)  # some entries see one key


@DTYPES
@pytest.mark.parametrize("head_dim", [192, 256])
@pytest.mark.parametrize("mask", [{"causal": True}, {"window": (400, 300)}], ids=["causal", "window"])
def test_ranges_keep_poison_out(dtype, head_dim, mask):
    ranges = {
        "key_range": int32([[0, 300], [133, 401], [140, 141], [7, 7]], "cuda"),
        "query_range": int32([[0, 200], [85, 390], [0, 390], [80, 161]], "cuda"),
    }
    q, k, v = make_qkv("cuda", dtype, 4, 390, 401, heads=4, heads_k=2, head_dim=head_dim)
    check_poison_outside_ranges(q, k, v, {**ranges, **mask, "deterministic": True})


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim, causal", [(256, False), (192, True)])
def test_many_repeats(head_dim, causal, deterministic):
    """As many as would show P or dS read before it came: dK and dV have one order, dQ has with turns."""
    q, k, v = make_qkv("cuda", torch.bfloat16, 4, 700, 700, heads=20, head_dim=head_dim)
    options = {"causal": causal, "deterministic": deterministic}
    first = run(q, k, v, options)
    for _ in range(250):
        again = run(q, k, v, options)
        assert all(torch.equal(first[name], again[name]) for name in first if deterministic or name != "dq")


@ON_HOPPER
@pytest.mark.architectures("default")
@pytest.mark.parametrize(
    "head_dim, options, kernel",
    [
        (136, {}, "paired_backward_kernel"),
        (256, {"causal": True, "deterministic": True}, "paired_backward_kernel"),
        (256, {"dropout_p": 0.1}, "wide_backward_kernel"),
        (256, {"softcap": 20.0}, "wide_backward_kernel"),
        (128, {}, None),
    ],
)
def test_which_kernel_serves(head_dim, options, kernel):
    q, k, v = make_qkv("cuda", torch.float16, 2, 300, 300, heads=4, head_dim=head_dim)
    if "dropout_p" in options:
        options = options | {"dropout_seed": seed_tensor(5, "cuda")}
    names = ("paired_backward_kernel", "wide_backward_kernel")
    found = [name for seen in kernels_of(run, q, k, v, options) for name in names if name in seen]
    assert found == ([kernel] if kernel else [])
