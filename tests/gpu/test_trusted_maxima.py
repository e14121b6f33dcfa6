"""Hopper's forward trusts the maximum of the key tiles before (csrc/sm90/forward_again.cuh): keys that outweigh it."""

import pytest
import torch
from attention_rule import check, int32, make_qkv, seed_tensor

from hf_flash import flash_attention

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
LENGTH = 700


def outweigh(k, kind):
    """Key tiles are taken from the last to the first: these keys make each, a few or one of them a surprise.

    Beyond 88 above the maximum before an exponential leaves float32.
    """
    keys = torch.arange(k.shape[1], device=k.device)
    growth = {
        "each": 1 + 30 * (len(keys) - keys) / len(keys),
        "some": torch.where(keys % 97 == 5, 40.0, 1.0),
        "first": torch.where(keys == 0, 60.0, 1.0),
        "beyond float32": torch.where(keys % 197 == 5, 150.0, 1.0),
    }
    return (k * growth[kind].view(1, -1, 1, 1)).to(k.dtype)


@DTYPES
@pytest.mark.parametrize("kind", ["each", "some", "first", "beyond float32"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (300, 200)}, {"dropout_p": 0.1}], ids=str)
@pytest.mark.parametrize("head_dim", [24, 64, 80, 128])
def test_keys_that_outweigh_all_before(dtype, head_dim, options, kind):
    """With 32 planes of 700 rows head dimensions to 64 take tiles of 192 rows."""
    q, k, v = make_qkv("cuda", dtype, 2, LENGTH, LENGTH, heads=16, heads_k=8, head_dim=head_dim)
    seed = {"dropout_seed": seed_tensor(7, "cuda")} if "dropout_p" in options else {}
    check(q, outweigh(k, kind), v, **options, **seed, small=True)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_beside_ranges_and_a_mask_of_keys(dtype, head_dim, dropout_p):
    q, k, v = make_qkv("cuda", dtype, 3, LENGTH, LENGTH, heads=16, head_dim=head_dim)
    seed = {"dropout_p": dropout_p, "dropout_seed": seed_tensor(7, "cuda")} if dropout_p else {}
    shown = torch.arange(LENGTH, device="cuda") % 5 != 2
    check(q, outweigh(k, "some"), v, mask=shown.view(1, 1, 1, LENGTH), **seed, small=True)
    check(q, outweigh(k, "some"), v, key_range=int32([[0, 700], [5, 6], [100, 391]], "cuda"), **seed, small=True)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("value", [50.0, float("inf"), float("nan")])
def test_a_surprised_row_changes_no_bit_of_another(dtype, head_dim, dropout_p, value):
    """Nor does one that is not finite, which rows of padding may be."""
    q, k, v = make_qkv("cuda", dtype, 2, LENGTH, LENGTH, heads=16, head_dim=head_dim)
    options = {"dropout_p": dropout_p, "dropout_seed": seed_tensor(3, "cuda"), "return_lse": True}
    results = []
    for factor in (1.0, value):
        rows = q.clone()
        rows[:, 5::16] *= factor
        results.append(flash_attention(rows, k, v, **options))
    others = torch.arange(LENGTH, device="cuda") % 16 != 5
    for name, plain, surprised in zip(("out", "lse"), *results, strict=True):
        rows_last = (lambda x: x) if name == "out" else (lambda x: x.mT)
        assert torch.equal(rows_last(plain)[:, others], rows_last(surprised)[:, others]), name
