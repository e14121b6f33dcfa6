"""Hopper's backward at head dimensions up to 64 with ALiBi or a bias and nothing that reads scores one by one: query
tiles of 128, whose dQ leaves from where their dS lay (kDqOverDs of csrc/sm90/backward_layout.cuh).
"""

import re

import pytest
import torch
from attention_rule import check, int32, make_qkv, poison_freed_memory, run, seed_tensor
from served_kernels import ON_HOPPER, kernels_of

pytestmark = pytest.mark.gpu


def terms(kind, dtype, heads, rows, cols) -> dict:
    """flash_attention's arguments."""
    torch.manual_seed(5)
    options = {}
    if "bias" in kind:
        options["bias"] = torch.randn(1, heads, rows, cols, device="cuda", dtype=dtype)
    if "alibi" in kind:
        options["alibi_slopes"] = torch.rand(heads, device="cuda") / 8
    if "dropped" in kind:
        options |= {"dropout_p": 0.1, "dropout_seed": seed_tensor(3, "cuda")}
    return options


KINDS = pytest.mark.parametrize("kind", ["alibi", "bias", "dropped alibi", "dropped bias", "bias and alibi"])


@KINDS
@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "ordered"])
@pytest.mark.parametrize(
    "rows, cols",
    [(1, 300), (64, 200), (65, 128), (129, 512), (300, 1100), (1100, 300), (1000, 1000)],
)
def test_lengths_in_free_and_fixed_order(rows, cols, deterministic, kind):
    """Up to 512 keys, and in a fixed order beyond, the last key tile reads the others' sums and writes dq."""
    poison_freed_memory()
    dtype = torch.bfloat16 if deterministic else torch.float16
    q, k, v = make_qkv("cuda", dtype, 2, rows, cols, heads=6, heads_k=3, head_dim=64)
    check(q, k, v, deterministic=deterministic, **terms(kind, dtype, 6, rows, cols))


@KINDS
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window": (100, 30)}, {"window": (200, -1)}, {"ranges": True}],
    ids=["causal", "window", "left", "ranges"],
)
def test_boundaries(options, kind):
    rows, cols, options = 700, 690, dict(options)
    if options.pop("ranges", False):
        options["key_range"] = int32([[3, 500], [200, 690]], "cuda")
        options["query_range"] = int32([[0, 700], [190, 333]], "cuda")
    q, k, v = make_qkv("cuda", torch.bfloat16, 2, rows, cols, heads=4, heads_k=2, head_dim=56)
    check(q, k, v, **options, **terms(kind, torch.bfloat16, 4, rows, cols))


@KINDS
@pytest.mark.parametrize("rows", [70, 200])
def test_many_pieces_of_work_of_few_steps(rows, kind):
    """One or two steps a piece of work, several pieces a CTA."""
    q, k, v = make_qkv("cuda", torch.float16, 3, rows, 1060, heads=24, head_dim=64)
    check(q, k, v, **terms(kind, torch.float16, 24, rows, 1060))


@pytest.mark.parametrize("kind", ["alibi", "dropped bias"])
def test_turns_of_more_key_tiles_than_multiprocessors(kind):
    """None of them finishes dq, and each has one step."""
    q, k, v = make_qkv("cuda", torch.bfloat16, 1, 70, 17104, heads=2, head_dim=64)
    check(q, k, v, deterministic=True, **terms(kind, torch.bfloat16, 2, 70, 17104))


@pytest.mark.parametrize("kind", ["dropped bias", "bias and alibi"])
@pytest.mark.parametrize("rows, cols", [(300, 500), (1000, 1100)])
def test_the_same_bits_in_a_fixed_order(rows, cols, kind):
    q, k, v = make_qkv("cuda", torch.bfloat16, 4, rows, cols, heads=12, head_dim=64)
    options = terms(kind, torch.bfloat16, 12, rows, cols) | {"deterministic": True}
    dout = torch.randn_like(q)
    first = run(q, k, v, options, dout=dout)
    for _ in range(60):
        again = run(q, k, v, options, dout=dout)
        assert all(torch.equal(again[name], first[name]) for name in ("dq", "dk", "dv"))


@ON_HOPPER
@pytest.mark.architectures("default")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_which_kernel_serves(dropout_p):
    """The backward's template arguments dropout, terms and queries of a tile; every term keeps tiles of 64."""
    q, k, v = make_qkv("cuda", torch.float16, 2, 380, 376, heads=4, head_dim=64)
    slopes, served = torch.rand(4, device="cuda"), {}
    for name, options in (("linear", {}), ("every", {"softcap": 20.0})):
        arguments = {"alibi_slopes": slopes, "dropout_p": dropout_p, **options}
        ran = kernels_of(run, q, k, v, arguments)
        pattern = r"BackwardTraits<__half, 64, (\w+), \(\w+::Terms\)(\d), (\d+), \w+, \w+>"
        served[name] = [match.groups() for kernel in ran if (match := re.search(pattern, kernel))]
    assert served == {"linear": [(str(dropout_p > 0).lower(), "1", "128")], "every": [("true", "2", "64")]}
