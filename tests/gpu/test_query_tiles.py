"""Both tiles of query rows that Hopper's forward has up to head dimension 64, and its kernels of linear terms alone."""

import math
import re

import pytest
import torch
from attention_rule import check, int32, make_qkv, run, seed_tensor
from served_kernels import ON_HOPPER, kernels_of

from hf_flash import flash_attention

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
MANY = {"heads": 48, "heads_k": 24}  # so many pieces of work that tiles of 192 rows are done before those of 128
FEW = {"heads": 4, "heads_k": 2}


def bias_of(dtype, heads, rows, cols):
    return torch.randn(1, heads, rows, cols, device="cuda", dtype=dtype)


def lowest(dtype, heads, rows, cols):
    """As masks are written: hardly visible keys, and rows without a visible one."""
    bias = bias_of(dtype, heads, rows, cols)
    bias[..., cols // 2 :] = torch.finfo(dtype).min
    bias[:, :, 9::50, ::3] = -math.inf
    bias[:, :, 11::50] = -math.inf
    return bias


OPTIONS = {
    "plain": lambda dtype, h: {},
    "dropout": lambda dtype, h: {"dropout_p": 0.1, "dropout_seed": seed_tensor(7, "cuda")},
    "rare": lambda dtype, h: {"dropout_p": 0.8, "dropout_seed": seed_tensor(8, "cuda")},  # below half: kept
    "left": lambda dtype, h: {"window": (100, -1)},
    "ranges": lambda dtype, h: {
        "key_range": int32([[3, 300], [200, 376]], "cuda"), "query_range": int32([[0, 380], [190, 201]], "cuda"),
    },
    "alibi": lambda dtype, h: {"alibi_slopes": torch.rand(h, device="cuda")},
    "bias": lambda dtype, h: {"bias": bias_of(dtype, h, 380, 376)},
    "dropped bias": lambda dtype, h: {
        "bias": bias_of(dtype, h, 380, 376), "dropout_p": 0.1, "dropout_seed": seed_tensor(9, "cuda"),
        "key_range": int32([[0, 376], [0, 301]], "cuda"), "scale": 1.0,  # T5
    },
    "lowest": lambda dtype, h: {"bias": lowest(dtype, h, 380, 376)},
    "both": lambda dtype, h: {
        "bias": bias_of(dtype, h, 380, 376), "alibi_slopes": torch.rand(2, h, device="cuda"), "window": (300, -1),
        "key_range": int32([[0, 376], [70, 333]], "cuda"), "scale": 0.7,
    },
    "single": lambda dtype, h: {"bias": bias_of(dtype, h, 380, 376).expand(2, -1, -1, -1).contiguous()},
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_both_tiles(dtype, head_dim, many, kind):
    heads = MANY if many else FEW
    q, k, v = make_qkv("cuda", dtype, 2, 380, 376, **heads, head_dim=head_dim)
    check(q, k, v, **OPTIONS[kind](dtype, heads["heads"]))


@DTYPES
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_rows_of_the_lowest_biases_alone(dtype, many):
    """Every key counts alike there; gradients are finite, and other rows' are the same as without such rows."""
    heads = MANY if many else FEW
    q, k, v = make_qkv("cuda", dtype, 2, 380, 376, **heads, head_dim=64)
    q[:, 7::50] = 0
    bias, results = bias_of(dtype, heads["heads"], 380, 376), []
    for value in (0.0, torch.finfo(dtype).min):
        bias[:, :, 7::50] = value
        dout = torch.ones_like(q)
        dout[:, 7::50] = 0
        results.append(run(q, k, v, {"bias": bias}, dout=dout))
        mean = v.float().mean(1, keepdim=True).repeat_interleave(2, 2).expand(-1, 8, -1, -1)
        torch.testing.assert_close(results[-1]["out"][:, 7::50].float(), mean, rtol=2e-2, atol=2e-2)
    for name, found in results[1].items():
        assert found.isfinite().all(), name
        if name in ("dk", "dv"):
            torch.testing.assert_close(found.float(), results[0][name].float(), rtol=2e-2, atol=2e-2)


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("alibi", [False, True])
def test_long_triangles_and_packed_batches(dtype, dropout_p, alibi):
    options = {"dropout_p": dropout_p, "dropout_seed": seed_tensor(3, "cuda")} if dropout_p else {}
    if alibi:
        options["alibi_slopes"] = torch.rand(8, device="cuda") / 8
    q, k, v = make_qkv("cuda", dtype, 1, 2100, 2100, heads=8, heads_k=4, head_dim=64)
    check(q, k, v, causal=True, **options)
    q, k, v = make_qkv("cuda", dtype, None, 3100, 3300, heads=8, heads_k=4, head_dim=64)
    starts = {"cu_seqlens_q": int32([0, 2500, 2500, 2693, 3100], "cuda"), "max_seqlen_q": 2500}
    starts |= {"cu_seqlens_k": int32([0, 2500, 2700, 2710, 3300], "cuda"), "max_seqlen_k": 2500}
    check(q, k, v, **starts, causal=True, **options)


@ON_HOPPER
@pytest.mark.architectures("default")
@pytest.mark.parametrize("dropout_p, alibi", [(0.0, False), (0.1, False), (0.0, True), (0.1, True)])
def test_which_kernel_serves(dropout_p, alibi):
    """The forward's template arguments dropout, terms and small, by the number of heads."""
    served = {}
    for name, heads in (("many", 48), ("few", 4)):
        q, k, v = make_qkv("cuda", torch.float16, 2, 380, 376, heads=heads, head_dim=64)
        slopes = torch.rand(heads, device="cuda") if alibi else None
        ran = kernels_of(flash_attention, q, k, v, dropout_p=dropout_p, alibi_slopes=slopes)
        arguments = r"ForwardTraits<__half, 64, (\w+), \(\w+::Terms\)(\d), (\w+), \w+>"
        found = [re.search(arguments, kernel) for kernel in ran]
        served[name] = [match.groups() for match in found if match]
    drops, none, linear, every = str(dropout_p > 0).lower(), "0", "1", "2"
    wanted = {
        "many": (drops, linear if alibi else none, "false"),
        "few": (drops, none, "true"),
    }
    if alibi:
        wanted["few"] = ("true", linear if dropout_p else every, "false")
    assert served == {name: [kernel] for name, kernel in wanted.items()}
