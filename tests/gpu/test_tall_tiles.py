"""Long calls of head dimension 128, for which Hopper's backward has query tiles of 80 (csrc/sm90/tall_backward.cuh)."""

import pytest
import torch
from attention_rule import check, check_poison_outside_ranges, int32, make_qkv, poison_freed_memory

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@DTYPES
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["plain", "causal", "window", "packed", "long", "long packed"])
@pytest.mark.parametrize("head_dim, head_dim_v", [(72, 72), (128, 128), (40, 104)])
def test_long_calls_of_wide_heads(dtype, head_dim, head_dim_v, kind, deterministic):
    """Lengths that end within a tile of 80 rows, masks, a packed batch with an empty sequence, many keys. The plain
    deterministic call is the other kernel's.
    """
    poison_freed_memory()
    shapes = {"packed": (None, 1900, 2300), "long packed": (None, 1900, 5700), "long": (1, 530, 9000)}
    shape = shapes.get(kind, (2, 777, 1100))
    q, k, v = make_qkv("cuda", dtype, *shape, heads=4, heads_k=2, head_dim=head_dim, head_dim_v=head_dim_v)
    options = {"causal": {"causal": True}, "window": {"window": (150, 300)}}
    for name, longest in (("packed", 900), ("long packed", 4300)):
        options[name] = {
            "cu_seqlens_q": int32([0, 700, 701, 781, 781, 1900], "cuda"),
            "cu_seqlens_k": int32([0, longest, *(longest + n for n in (100, 101, 250, 1400))], "cuda"),
            "max_seqlen_q": 1119,
            "max_seqlen_k": max(longest, 1150),
            "causal": True,
        }
    check(q, k, v, deterministic=deterministic, **options.get(kind, {}))


@pytest.mark.parametrize("deterministic", [False, True])
def test_many_pieces_of_work_of_one_step(deterministic):
    """Almost three a multiprocessor, each with a place of K that the one before must give back first."""
    q, k, v = make_qkv("cuda", torch.bfloat16, 4, 530, 901, heads=12, head_dim=128)
    rows = int32([[80, 160]] * 4, "cuda")
    check(q, k, v, query_range=rows, window=(900, 900), deterministic=deterministic)
    check(q, k, v, query_range=rows, deterministic=deterministic)


@DTYPES
@pytest.mark.parametrize("mask", [{"causal": True}, {"window": (400, 300)}], ids=["causal", "window"])
def test_ranges_of_long_calls_keep_poison_out(dtype, mask):
    ranges = {
        "key_range": int32([[0, 700], [333, 901], [640, 641], [7, 7]], "cuda"),
        "query_range": int32([[0, 600], [85, 790], [0, 790], [80, 161]], "cuda"),
    }
    q, k, v = make_qkv("cuda", dtype, 4, 790, 901, heads=4, heads_k=2, head_dim=128)
    check_poison_outside_ranges(q, k, v, {**ranges, **mask, "deterministic": True})
