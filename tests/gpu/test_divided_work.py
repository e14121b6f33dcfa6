"""Calls whose last pieces of work Hopper's CTAs divide by steps (csrc/attention/divided_work.h): more key tiles than
multiprocessors and no multiple of their number, all seen by the same 2048 or more queries, and dq has room for the
sums. Counted for 132 multiprocessors; on others the same calls may run undivided.
"""

import pytest
import torch
from attention_rule import check, int32, make_qkv, poison_freed_memory, run, seed_tensor

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
SHAPES = {  # batch, seqlen_q, seqlen_k, heads, heads_k; then key tiles a multiprocessor
    "a little more than two": (3, 2600, 1300, 9, 9),  # 2.25
    "a third more than one": (1, 2300, 4400, 10, 5),  # 1.33; two query heads share each
    "a little less than four": (4, 2600, 1200, 12, 12),  # 3.64
}


def qkv(shape, dtype, head_dim):
    batch, seqlen_q, seqlen_k, heads, heads_k = SHAPES[shape]
    return make_qkv("cuda", dtype, batch, seqlen_q, seqlen_k, heads=heads, heads_k=heads_k, head_dim=head_dim)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_shapes(shape, head_dim, dtype):
    poison_freed_memory()
    check(*qkv(shape, dtype, head_dim))


@DTYPES
@pytest.mark.parametrize("head_dim", [40, 72])
def test_padded_head_dims(head_dim, dtype):
    poison_freed_memory()
    check(*qkv("a little less than four", dtype, head_dim))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("term", ["dropout", "alibi", "bias", "dropped bias", "softcap", "key mask", "query offset"])
def test_terms(term, head_dim):
    """A mask of keys gives each sequence a range of its own, so that call is not divided; the others are."""
    q, k, v = qkv("a little more than two", torch.bfloat16, head_dim)
    hidden = torch.ones(3, 1, 1, 1300, dtype=torch.bool, device="cuda")
    hidden[0, ..., 100:300], hidden[1, ..., 640:], hidden[2, ..., ::7] = False, False, False
    bias = torch.randn(1, 9, 2600, 1300, device="cuda", dtype=q.dtype)
    options = {
        "dropout": {"dropout_p": 0.1, "dropout_seed": seed_tensor(5, "cuda")},
        "bias": {"bias": bias},
        "dropped bias": {"bias": bias, "dropout_p": 0.1, "dropout_seed": seed_tensor(6, "cuda")},
        "alibi": {"alibi_slopes": torch.linspace(0.01, 0.2, 9, device="cuda")},
        "softcap": {"softcap": 20.0},
        "key mask": {"mask": hidden},
        "query offset": {"query_offset": int32([0, 5, -3], "cuda")},
    }
    check(q, k, v, **options[term])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_dk_and_dv_have_the_same_bits_each_time(head_dim):
    """Whoever of two CTAs ends first, their sums are added in one order; dq's additions come as they come."""
    q, k, v = qkv("a little more than two", torch.bfloat16, head_dim)
    dout = torch.randn_like(q)
    first = run(q, k, v, {}, dout=dout)
    for _ in range(20):
        again = run(q, k, v, {}, dout=dout)
        assert torch.equal(again["dk"], first["dk"]) and torch.equal(again["dv"], first["dv"])
