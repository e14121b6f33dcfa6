"""Long calls of head dimension 128, for which Hopper's backward has query tiles of 80 (csrc/sm90/tall_backward.cuh)."""

import math

import pytest
import torch
from attention_rule import check, int32, make_qkv, poison_freed_memory, run

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@DTYPES
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["plain", "causal", "window", "packed", "long"])
@pytest.mark.parametrize("head_dim", [72, 128])
def test_long_calls_of_wide_heads(dtype, head_dim, kind, deterministic):
    """Lengths that end within a tile of 80 rows, masks, a packed batch with an empty sequence."""
    poison_freed_memory()
    shape = {"packed": (None, 1900, 2300), "long": (1, 530, 4200)}.get(kind, (2, 777, 1100))
    q, k, v = make_qkv("cuda", dtype, *shape, heads=4, heads_k=2, head_dim=head_dim)
    options = {
        "causal": {"causal": True},
        "window": {"window": (150, 300)},
        "packed": {
            "cu_seqlens_q": int32([0, 700, 701, 781, 781, 1900], "cuda"),
            "cu_seqlens_k": int32([0, 900, 1000, 1001, 1150, 2300], "cuda"),
            "max_seqlen_q": 1119,
            "max_seqlen_k": 1150,
            "causal": True,
        },
    }
    check(q, k, v, deterministic=deterministic, **options.get(kind, {}))


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_ranges_of_long_calls_keep_poison_out(dtype, causal):
    ranges = {
        "key_range": int32([[0, 700], [333, 901], [640, 641], [7, 7]], "cuda"),
        "query_range": int32([[0, 600], [85, 790], [0, 790], [80, 161]], "cuda"),
    }
    results = []
    for poison in (0.0, math.nan):
        q, k, v = make_qkv("cuda", dtype, 4, 790, 901, heads=4, heads_k=2, head_dim=128)
        for tensors, name in (((q,), "query_range"), ((k, v), "key_range")):
            for x in tensors:
                for row, (begin, end) in zip(x, ranges[name].tolist(), strict=True):
                    row[:begin], row[end:] = poison, poison
        dout = q.clone()  # NaN in the same rows
        results.append(run(q, k, v, {**ranges, "causal": causal, "deterministic": True}, dout=dout))
    for name, clean in results[0].items():
        assert torch.equal(clean, results[1][name]), f"NaN outside the ranges changes {name}"
        assert name == "lse" or clean.isfinite().all()
