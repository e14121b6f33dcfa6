"""The mma.sync kernels' bias, whose tiles warps copy to shared memory where they can (csrc/sm80/bias_tile.cuh), and the
kernels of linear terms alone; every architecture runs the same calls.
"""

import re

import pytest
import torch
from attention_rule import check, int32, make_qkv, poison_freed_memory, run, seed_tensor
from served_kernels import kernels_of

pytestmark = pytest.mark.gpu
DROPOUT = pytest.mark.parametrize("dropout_p", [0.0, 0.1])


def dropout(p):
    return {"dropout_p": p, "dropout_seed": seed_tensor(7, "cuda")} if p else {}


def normal(dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to("cuda", dtype)


# Name -> a bias of so many heads, rows and columns: tiles of the first four are copied, elements of the others read one
# by one.
LAYOUTS = {
    "whole": lambda heads, rows, cols: normal(torch.float16, 2, heads, rows, cols),
    "batch": lambda heads, rows, cols: normal(torch.float16, 1, heads, rows, cols),
    "one row": lambda heads, rows, cols: normal(torch.float16, 1, heads, 1, cols),
    "long rows": lambda heads, rows, cols: normal(torch.float16, 1, heads, rows, cols + 40)[..., 8 : cols + 8],
    "odd place": lambda heads, rows, cols: normal(torch.float16, 1, heads, rows, cols + 8)[..., 1 : cols + 1],
    "one column": lambda heads, rows, cols: normal(torch.float16, 1, heads, rows, 1),
    "transposed": lambda heads, rows, cols: normal(torch.float16, 1, heads, cols, rows).mT,
    "float32": lambda heads, rows, cols: normal(torch.float32, 1, heads, rows, cols),
}


@DROPOUT
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, head_dim, dropout_p):
    rows, cols = 150, 168  # no multiples of a tile
    q, k, v = make_qkv("cuda", torch.float16, 2, rows, cols, heads=4, heads_k=2, head_dim=head_dim)
    poison_freed_memory()
    bias = LAYOUTS[layout](4, rows, cols)
    check(q, k, v, bias=bias, causal=True, small=True, **dropout(dropout_p))


@DROPOUT
@pytest.mark.parametrize("head_dim", [48, 64, 128])
@pytest.mark.parametrize("rows, cols", [(1, 8), (70, 16), (129, 520), (300, 72)])
def test_lengths_and_ranges(rows, cols, head_dim, dropout_p):
    """Warps without a row or a key of their own, tiles of which a warp sees none, some or all."""
    q, k, v = make_qkv("cuda", torch.bfloat16, 2, rows, cols, heads=2, head_dim=head_dim)
    ranges = {
        "query_range": int32([[0, rows], [rows // 3, rows]], "cuda"),
        "key_range": int32([[cols // 2, cols], [0, cols - 3]], "cuda"),
    }
    slopes = {"alibi_slopes": torch.tensor([0.2, 0.05], device="cuda")}
    for options in ({}, ranges, slopes | {"window": (40, 9)}):
        poison_freed_memory()
        bias = normal(torch.bfloat16, 1, 2, rows, cols)
        check(q, k, v, bias=bias, small=True, **options, **dropout(dropout_p))


@DROPOUT
def test_nothing_behind_a_sequence_is_read(dropout_p):
    """Rows that are longer than the keys, NaN between them and behind the last one."""
    q, k, v = make_qkv("cuda", torch.float16, 2, 100, 76, heads=2, head_dim=64)
    memory = torch.full((2, 100, 80), torch.nan, device="cuda", dtype=torch.float16)
    bias = memory[None, ..., :76]
    bias.copy_(normal(torch.float16, 1, 2, 100, 76))
    results = run(q, k, v, {"bias": bias, "deterministic": True} | dropout(dropout_p))
    memory[..., 76:] = 0
    clean = run(q, k, v, {"bias": bias, "deterministic": True} | dropout(dropout_p))
    assert all(torch.equal(results[name], clean[name]) for name in clean)


@DROPOUT
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 300), (1, 1, 600, 1)], ids=["one", "keys", "rows"])
def test_sums_over_many_tiles(shape, dropout_p):
    """More score tiles than a CTA lists at once, among them ones that nobody sees."""
    q, k, v = make_qkv("cuda", torch.float16, 3, 600, 300, heads=4, heads_k=2, head_dim=64)
    ranges = {"key_range": int32([[0, 300], [0, 0], [150, 290]], "cuda")}
    for options in ({}, {"causal": True}, ranges):
        check(q, k, v, bias=normal(torch.float16, *shape), small=True, **options, **dropout(dropout_p))


@DROPOUT
@pytest.mark.architectures("sm80")
def test_which_kernels_serve(dropout_p):
    """Template arguments: dropout and terms, 1 where they are linear, 2 for every one."""
    q, k, v = make_qkv("cuda", torch.float16, 2, 136, 128, heads=2, head_dim=64)
    bias = normal(torch.float16, 1, 2, 136, 128)
    served = {}
    for name, options in (("linear", {}), ("softcap", {"softcap": 20.0}), ("odd", {"bias": bias.mT.contiguous().mT})):
        arguments = {"bias": bias, **options, **dropout(dropout_p)}
        pattern = r"(forward|backward|bias_gradient)_kernel<.*?__half, (?:64, )?\w+, \(\w+::Terms\)(\d)"
        ran = kernels_of(run, q, k, v, arguments)
        served[name] = dict(match.groups() for kernel in ran if (match := re.search(pattern, kernel)))
    every = {"forward": "2", "backward": "2", "bias_gradient": "2"}
    assert served == {"linear": dict.fromkeys(every, "1"), "softcap": every, "odd": every}
