"""Calls at the edge: rows that see nothing, empty sequences and tensors, one row, layouts of every kind."""

import itertools
import math

import pytest
import torch
from attention_rule import check, int32, make_qkv, random_like, run, seed_tensor

from hf_flash import flash_attention

NOTHING = {
    "mask": lambda d: {"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=d)},
    "bias": lambda d: {"bias": torch.full((1, 1, 1, 60), -math.inf, device=d)},
    "key_range": lambda d: {"key_range": int32([[5, 5], [60, 60]], d)},
    "window": lambda d: {"window": (-1, 0), "query_offset": int32([-100, -40], d)},
    "query_range": lambda d: {"query_range": int32([[0, 0], [40, 40]], d)},
}


@pytest.mark.parametrize("why", NOTHING)
def test_rows_that_see_nothing(device, dtype, why):
    q, k, v = make_qkv(device, dtype, 2, 40, 60)
    dlse = random_like(torch.empty(2, 2, 40), torch.float32, 1).to(device)
    options = NOTHING[why](device) | {"dropout_p": 0.1, "dropout_seed": seed_tensor(1, device)}
    got = run(q, k, v, options, dlse=dlse)
    assert (got["lse"] == -math.inf).all()
    for name in got.keys() - {"lse"}:
        assert (got[name] == 0).all(), name


@pytest.mark.parametrize("why", ["mask", "bias", "key_range", "window"])
def test_rows_that_see_nothing_but_the_sink(device, dtype, why):
    q, k, v = make_qkv(device, dtype, 2, 40, 60)
    sink = torch.tensor([0.5, -3.0], device=device)
    dlse = random_like(torch.empty(2, 2, 40), torch.float32, 1).to(device)
    got = run(q, k, v, NOTHING[why](device) | {"sink": sink}, dlse=dlse)
    torch.testing.assert_close(got["lse"], sink[None, :, None].expand(2, 2, 40))
    torch.testing.assert_close(got["dsink"], dlse.sum((0, 2)), rtol=1e-4, atol=1e-4)
    for name in got.keys() - {"lse", "dsink"}:
        assert (got[name] == 0).all(), name


def test_some_rows_see_nothing(device, dtype):
    """Causal with more queries than keys: the first rows stand before the first key."""
    q, k, v = make_qkv(device, dtype, 2, 150, 70, heads=4, heads_k=2)
    got = check(q, k, v, causal=True, dropout_p=0.2, dropout_seed=seed_tensor(1, device))
    assert (got["out"][:, :80] == 0).all() and (got["dq"][:, :80] == 0).all()
    assert (got["lse"][:, :, :80] == -math.inf).all() and got["lse"][:, :, 80:].isfinite().all()


@pytest.mark.parametrize("hidden", [slice(0, 64), slice(64, 128), slice(100, 141), slice(0, 141)])
def test_hidden_tiles_in_the_middle(device, dtype, hidden):
    """Whole tiles of keys hidden by bias or by mask, before, between and after visible ones."""
    q, k, v = make_qkv(device, dtype, 1, 70, 141)
    bias = torch.zeros(1, 2, 70, 141, device=device, dtype=dtype)
    bias[..., hidden] = -math.inf
    mask = torch.ones(1, 1, 70, 141, device=device, dtype=torch.bool)
    mask[..., hidden] = False
    by_bias = check(q, k, v, small=True, bias=bias)
    by_mask = check(q, k, v, small=True, mask=mask)
    assert (by_bias["dbias"][..., hidden] == 0).all()
    assert (by_mask["dk"][:, hidden] == 0).all() and (by_bias["dv"][:, hidden] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
def test_empty_tensors(device, dtype, shape):
    q, k, v = make_qkv(device, dtype, *shape, heads=2, head_dim=16)
    sink = torch.zeros(2, device=device)
    for options in ({}, {"causal": True}, {"sink": sink}, {"dropout_p": 0.5, "dropout_seed": seed_tensor(1, device)}):
        got = check(q, k, v, **options)
        assert got["out"].shape == q.shape and got["lse"].shape == (shape[0], 2, shape[1])


@pytest.mark.parametrize(
    "lengths_q, lengths_k", [((0,), (0,)), ((0, 0), (3, 0)), ((4, 0), (0, 0)), ((0, 3), (5, 3)), ((), ())]
)
def test_empty_sequences(device, dtype, lengths_q, lengths_k):
    q, k, v = make_qkv(device, dtype, None, sum(lengths_q), sum(lengths_k), head_dim=16)
    starts = [int32([sum(n[:b]) for b in range(len(n) + 1)], device) for n in (lengths_q, lengths_k)]
    sink = torch.randn(2, device=device)
    options = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": 4, "max_seqlen_k": 5, "sink": sink}
    check(q, k, v, small=True, **options)
    check(q, k, v, small=True, causal=True, **options)


def test_no_queries_or_keys_in_any_layout(device, dtype):
    """An empty tensor counts as contiguous whatever its strides are."""
    bounds, none = int32([0, 5], device), int32([0, 0], device)
    full = torch.randn(5, 2, 16, device=device).to(dtype)
    empty = torch.empty(0, 16, 2, device=device, dtype=dtype).transpose(1, 2)
    lengths = {"max_seqlen_q": 5, "max_seqlen_k": 5}
    check(full, empty, empty, cu_seqlens_q=bounds, cu_seqlens_k=none, small=True, **lengths)
    bias = torch.randn(1, 2, 8, 8, device=device).to(dtype)
    check(
        full,
        empty,
        empty,
        cu_seqlens_q=bounds,
        cu_seqlens_k=none,
        small=True,
        bias=bias,
        max_seqlen_q=8,
        max_seqlen_k=8,
    )
    check(empty, full, full, cu_seqlens_q=none, cu_seqlens_k=bounds, small=True, **lengths)


def test_a_packed_batch_of_no_sequences():
    bounds = int32([0], "cpu")
    q = torch.randn(5, 2, 16, requires_grad=True)
    for _ in range(20):  # gradients that nobody writes would show this
        torch.full_like(q, math.nan)
    out, lse = flash_attention(
        q, q, q, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=1, max_seqlen_k=1, return_lse=True
    )
    assert (out == 0).all() and (lse == -math.inf).all()
    (gradient,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert (gradient == 0).all()


def test_packed_lengths_are_read_from_the_device_where_none_are_given(device, dtype):
    q, k, v = make_qkv(device, dtype, None, 30, 30)
    starts = int32([0, 11, 11, 30], device)
    got = flash_attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
    for longest in (19, 64):
        lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        again = flash_attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, **lengths)
        assert torch.equal(got, again)


def test_wrong_cu_seqlens_are_clamped(device, plain_dtype):
    """Nonsense on the device: no result is promised, but nothing is read or written outside the tensors."""
    q, k, v = make_qkv(device, plain_dtype, None, 30, 30)
    for values in ([-5, 40, 10, 99], [0, 2**31 - 1, 3, 30], [30, 20, 10, 0], [-(2**31), 2**31 - 1, 0, 5]):
        starts = int32(values, device)
        options = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 30, "max_seqlen_k": 30}
        got = run(q, k, v, options | {"causal": True})
        assert got["out"].shape == q.shape and got["out"].isfinite().all() and got["dk"].isfinite().all()
        options |= {"query_offset": int32([2**31 - 1, -(2**31), 7], device)}
        assert run(q, k, v, options | {"window": (3, 2)})["dq"].isfinite().all()


LAYOUTS = {
    "heads_first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch_second": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "slice": lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "strided": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every_second_row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "padded_rows": lambda t: torch.nn.functional.pad(t, (0, 3))[..., : t.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    """Strides change no bit, of inputs and of dout."""
    q, k, v = make_qkv(device, dtype, 2, 37, 45, heads=4, heads_k=2)
    dout = random_like(q, dtype, 2)
    change = LAYOUTS[layout]
    want = run(q, k, v, {"deterministic": True}, dout=dout)
    got = run(change(q), change(k), change(v), {"deterministic": True}, dout=change(dout))
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_one_projection_for_q_k_and_v(device, dtype):
    """q, k and v as slices of one tensor, as models project them; the gradient goes back to it."""
    qkv = torch.randn(2, 33, 3, 4, 32).to(device, dtype).requires_grad_()
    flash_attention(*qkv.unbind(2), causal=True).sum().backward()
    apart = [t.detach().clone().requires_grad_() for t in qkv.unbind(2)]
    flash_attention(*apart, causal=True).sum().backward()
    assert torch.equal(qkv.grad, torch.stack([t.grad for t in apart], dim=2))


@pytest.mark.parametrize("expanded", ["batch", "heads", "rows"])
def test_expanded_inputs(device, dtype, expanded):
    """Stride 0 in a dimension; gradients have the expanded shape."""
    dim = {"batch": 0, "rows": 1, "heads": 2}[expanded]
    full = make_qkv(device, dtype, 3, 40, 40, heads=4)
    narrow = [t.narrow(dim, 0, 1).expand(t.shape) for t in full]
    assert all(t.stride(dim) == 0 for t in narrow)
    got = run(*narrow, {"deterministic": True})
    want = run(*(t.contiguous() for t in narrow), {"deterministic": True})
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_gradient_of_a_sum(device, dtype):
    """out.sum() gives a dout of stride 0 in every dimension."""
    q, k, v = make_qkv(device, dtype, 2, 40, 50)
    expanded = torch.ones((), device=device, dtype=dtype).expand(2, 40, 2, 32)
    got, want = run(q, k, v, {}, dout=expanded), run(q, k, v, {}, dout=expanded.contiguous())
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0 if device == "cpu" else 2e-2)
    check(q, k, v, dout=expanded)


def test_the_same_tensor_three_times(device, dtype):
    x = make_qkv(device, dtype, 1, 20, 20)[0].requires_grad_()
    flash_attention(x, x, x).sum().backward()
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    flash_attention(*parts).sum().backward()
    torch.testing.assert_close(x.grad, sum(t.grad for t in parts), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_visible_nan_is_seen_in_every_gradient(device, dtype, dropout_p, head_dim):
    """A query of NaN: its own row, and every key's gradients, for all of them see it."""
    q, k, v = make_qkv(device, dtype, 1, 70, 90, head_dim=head_dim)
    q[0, 3] = math.nan
    dropout = {"dropout_p": dropout_p, "dropout_seed": seed_tensor(1, device)} if dropout_p else {}
    got = run(q, k, v, dropout)
    assert got["out"][0, 3].isnan().all() and got["dq"][0, 3].isnan().all()
    assert got["dk"].isnan().all()
    assert got["dv"].isnan().any(-1).any(1).all() if dropout_p else got["dv"].isnan().all()
    rows = [i for i in range(70) if i != 3]
    assert not got["out"][0, rows].isnan().any() and not got["dq"][0, rows].isnan().any()


@pytest.mark.parametrize("value", [1e-30, 60000.0, 1e30])
def test_large_and_small_values(device, dtype, value):
    """Rows whose scores are far apart stay finite: the maximum is subtracted before exponentials.

    The GPU subtracts it inside a fused multiply-add whose shift is rounded to float32, as FlashAttention's kernels do:
    scores keep their meaning up to about 2^20 there.
    """
    value = min(value, torch.finfo(dtype).max, 60000.0 if device == "cuda" else 1e30)
    q = torch.full((1, 4, 1, 8), 1.0, device=device, dtype=dtype)
    k = torch.full((1, 4, 1, 8), value, device=device, dtype=dtype)
    k[:, 1:] = -k[:, 1:]
    v = torch.arange(32.0, device=device).reshape(1, 4, 1, 8).to(dtype)
    out = flash_attention(q, k, v, scale=1.0)
    want = v[:, :1] if value > 1 else v.float().mean(1, keepdim=True).to(dtype)
    torch.testing.assert_close(out, want.expand_as(out), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bias_dtype", ["own", "float32"])
def test_rows_whose_biases_are_all_the_lowest_number(device, dtype, bias_dtype):
    """As Transformers hides a padded row: nothing is hidden then, every key counts alike."""
    bias_dtype = dtype if bias_dtype == "own" else torch.float32
    q, k, v = make_qkv(device, dtype, 1, 40, 72, heads=2, head_dim=64)
    q[:, 5:9] = 0  # float16's lowest number does not swallow scores
    bias = torch.randn(1, 1, 40, 72, device=device).to(bias_dtype)
    bias[..., 5:9, :] = torch.finfo(bias_dtype).min
    out, lse = flash_attention(q, k, v, bias=bias, return_lse=True)
    mean = v.float().mean(1, keepdim=True).expand(1, 4, 2, 64)
    torch.testing.assert_close(out[:, 5:9].float(), mean, rtol=2e-2, atol=2e-2)
    assert lse.isfinite().all()


def test_deterministic_gives_the_same_bits(device, dtype):
    q, k, v = make_qkv(device, dtype, 2, 150, 170, heads=4, heads_k=1)
    for shape in ((1, 4, 1, 170), (1, 4, 150, 170), (2, 4, 150, 170)):
        bias = torch.randn(shape, device=device)
        options = {"bias": bias, "sink": torch.randn(4, device=device), "deterministic": True, "causal": True}
        first = run(q, k, v, options)
        for _ in range(3):
            again = run(q, k, v, options)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("sums", list(itertools.product((False, True), repeat=4)), ids=str)
def test_gradients_of_biases_that_broadcast(device, dtype, sums):
    """Every choice of dimensions of size 1, at lengths of more than a tile of the GPU's kernel."""
    q, k, v = make_qkv(device, dtype, 2, 150, 270, heads=4, heads_k=2, head_dim=72, head_dim_v=64)
    shape = tuple(1 if one else n for one, n in zip(sums, (2, 4, 150, 270), strict=True))
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    seed = seed_tensor(3, device)
    check(q, k, v, bias=bias, causal=True, window=(200, 0), dropout_p=0.1, dropout_seed=seed, small=True)


def test_a_bias_that_nothing_reaches_has_gradient_zero(device, dtype):
    """Keys behind every range, rows of no sequence, a batch of no sequences, no queries at all."""
    q, k, v = make_qkv(device, dtype, 2, 150, 270)
    ranges = {"key_range": int32([[0, 100], [10, 90]], device), "query_range": int32([[0, 9], [0, 0]], device)}
    for shape in ((1, 2, 150, 270), (1, 1, 150, 270), (1, 2, 1, 270), (2, 2, 150, 270)):
        dbias = run(q, k, v, ranges | {"bias": torch.randn(shape, device=device)})["dbias"]
        assert (dbias[..., 100:] == 0).all() and dbias[..., :100].isfinite().all()
        assert shape[2] == 1 or (dbias[:, :, 9:] == 0).all()
    none = {"bias": torch.randn(1, 2, 1, 270, device=device)}
    assert (run(q[:, :0], k, v, none)["dbias"] == 0).all()
    starts = int32([0, 30, 50], device)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 200, "max_seqlen_k": 300}
    rows = [t[0, :60].contiguous() for t in (q, k, v)]
    for shape in ((1, 2, 200, 300), (2, 1, 200, 300), (1, 2, 1, 300)):
        dbias = run(*rows, packed | {"bias": torch.randn(shape, device=device)})["dbias"]
        assert (dbias[..., 30:] == 0).all() and dbias.isfinite().all()
        assert shape[2] == 1 or (dbias[:, :, 30:] == 0).all()


def test_the_number_of_threads_changes_no_bit():
    q, k, v = make_qkv("cpu", torch.float32, 2, 150, 170, heads=4, heads_k=1)
    options = {"bias": torch.randn(1, 4, 1, 170), "sink": torch.randn(4), "causal": True}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(q, k, v, options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_row_sums(device, dtype):
    """The operator under the backward: sum over Dv of dout * out, minus lse's gradient."""
    for shape, sums in (((2, 33, 4, 40), (2, 4, 33)), ((77, 3, 24), (3, 77)), ((0, 3, 8), (3, 0))):
        out, dout = (torch.randn(shape).to(device, dtype) for _ in range(2))
        dlse = torch.randn(sums, device=device)
        want = (out.double() * dout.double()).sum(-1).mT
        got = torch.ops.hf_flash.row_sum(dout, out, None)
        assert got.shape == sums and got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            torch.ops.hf_flash.row_sum(dout, out, dlse), (want - dlse).float(), rtol=1e-5, atol=1e-4
        )
