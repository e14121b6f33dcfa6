"""flash-attn's functions: signatures, meaning, and agreement with the float64 reference."""

import inspect

import pytest
import torch
from attention_rule import int32, judge, make_qkv

import hf_flash
from hf_flash import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from hf_flash.reference import reference_attention

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
PLACES = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {COMMON})",
    "flash_attn_qkvpacked_func": f"(qkv, {COMMON})",
    "flash_attn_kvpacked_func": f"(q, kv, {COMMON})",
    "flash_attn_varlen_func": f"(q, k, v, {PLACES}, {COMMON}, block_table=None)",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {COMMON})",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {PLACES}, {COMMON})",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert str(inspect.signature(getattr(hf_flash, name))) == SIGNATURES[name]
    assert getattr(hf_flash.attention, name) is getattr(hf_flash, name)


def agree(ours, options, q, k, v):
    want, _ = reference_attention(q, k, v, **options)
    own, _ = reference_attention(q, k, v, **options, dtype=q.dtype)
    judge("out", ours, want, own)


OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (5, 2)}, {"window": (5, 2)}),
    "negative window": ({"window_size": (-3, 4)}, {"window": (-1, 4)}),
    "scale and softcap": ({"softmax_scale": 0.3, "softcap": 2.0}, {"scale": 0.3, "softcap": 2.0}),
    "no softcap": ({"softcap": -1.0}, {}),
}


@pytest.mark.parametrize("theirs, ours", OPTIONS.values(), ids=OPTIONS.keys())
def test_padded_forms(device, dtype, theirs, ours):
    q, k, v = make_qkv(device, dtype, 2, 30, 45, heads=4, heads_k=2)
    agree(flash_attn_func(q, k, v, **theirs), ours, q, k, v)
    agree(flash_attn_kvpacked_func(q, torch.stack([k, v], dim=2), **theirs), ours, q, k, v)
    agree(flash_attn_qkvpacked_func(torch.stack([q, q, 2 * q], dim=2), **theirs), ours, q, q, 2 * q)


@pytest.mark.parametrize("theirs, ours", OPTIONS.values(), ids=OPTIONS.keys())
def test_packed_forms(device, dtype, theirs, ours):
    q, k, v = make_qkv(device, dtype, None, 30, 45, heads=4, heads_k=2)
    starts, starts_k = int32([0, 10, 10, 30], device), int32([0, 25, 30, 45], device)
    places = {"cu_seqlens_q": starts, "cu_seqlens_k": starts_k, "max_seqlen_q": 20, "max_seqlen_k": 25}
    agree(flash_attn_varlen_func(q, k, v, **places, **theirs), ours | places, q, k, v)
    agree(flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], dim=1), **places, **theirs), ours | places, q, k, v)
    places |= {"cu_seqlens_k": starts, "max_seqlen_k": 20}
    qkv = torch.stack([q, q, 2 * q], dim=1)
    agree(flash_attn_varlen_qkvpacked_func(qkv, starts, 20, **theirs), ours | places, q, q, 2 * q)


def test_alibi(device, plain_dtype):
    q, k, v = make_qkv(device, plain_dtype, 2, 20, 30)
    slopes = torch.rand(2, 2, device=device)
    agree(flash_attn_func(q, k, v, alibi_slopes=slopes), {"alibi_slopes": slopes}, q, k, v)


def test_positional_arguments_mean_what_they_mean_there(device, plain_dtype):
    q, k, v = make_qkv(device, plain_dtype, 1, 20, 20)
    got = flash_attn_func(q, k, v, 0.0, 0.5, True, (4, -1), 3.0, None, True, False)
    agree(got, {"scale": 0.5, "causal": True, "window": (4, -1), "softcap": 3.0}, q, k, v)


def test_bottom_right_alignment(device, plain_dtype):
    """Two queries over five keys, causal: the first sees four."""
    q, k, _ = make_qkv(device, plain_dtype, 1, 2, 5, heads=1, head_dim=8)
    v = torch.eye(5, 8, device=device, dtype=plain_dtype)[None, :, None]
    seen = flash_attn_func(q, k, v, causal=True)[0, :, 0, :5] > 0
    assert seen.tolist() == [[True, True, True, True, False], [True] * 5]


def test_gradient_of_the_packed_tensor(device, dtype):
    qkv = torch.randn(2, 20, 3, 4, 16).to(device, dtype).requires_grad_()
    flash_attn_qkvpacked_func(qkv, causal=True, deterministic=True).float().square().sum().backward()
    q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(2))
    flash_attn_func(q, k, v, causal=True, deterministic=True).float().square().sum().backward()
    assert torch.equal(qkv.grad, torch.stack([q.grad, k.grad, v.grad], dim=2))


@pytest.mark.parametrize("head_dim", [4, 12, 30, 100])
def test_head_dims_that_are_no_multiple_of_8(device, dtype, head_dim):
    q, k, v = make_qkv(device, dtype, 1, 20, 25, head_dim=head_dim)
    agree(flash_attn_func(q, k, v), {}, q, k, v)


def test_attention_probabilities_without_dropout(device, dtype):
    q, k, v = make_qkv(device, dtype, 2, 20, 25, heads=4, heads_k=2)
    out, lse, weights = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert weights is None and lse.shape == (2, 4, 20)
    assert torch.equal(out, flash_attn_func(q, k, v, causal=True))
    torch.testing.assert_close(lse.double(), reference_attention(q, k, v, causal=True)[1], rtol=1e-5, atol=1e-5)


def test_attention_probabilities_show_what_was_dropped(device, dtype):
    """The signs are the forward's own mask, the sizes the weights before dropout: together they give out again."""
    q, k, v = make_qkv(device, dtype, 2, 40, 50, heads=4, heads_k=2)
    options = {"causal": True, "softcap": 4.0, "alibi_slopes": torch.rand(4, device=device)}
    out, lse, weights = flash_attn_func(q, k, v, dropout_p=0.25, **options, return_attn_probs=True)
    assert weights.shape == (2, 4, 40, 50) and weights.dtype == dtype and lse.shape == (2, 4, 40)
    torch.testing.assert_close(weights.abs().float().sum(-1), torch.ones(2, 4, 40, device=device), rtol=1e-2, atol=1e-2)
    kept = weights.double().clamp(min=0) * 256 / 192
    want = torch.einsum("bhij,bjhd->bihd", kept, v.double().repeat_interleave(2, 2))
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)
    assert 0.2 < (weights < 0).sum() / (weights != 0).sum() < 0.3


def test_packed_attention_probabilities(device, dtype):
    q, k, v = make_qkv(device, dtype, None, 30, 30, heads=2)
    starts = int32([0, 10, 30], device)
    out, lse, weights = flash_attn_varlen_func(q, k, v, starts, starts, 20, 20, dropout_p=0.5, return_attn_probs=True)
    assert weights.shape == (2, 2, 20, 20) and lse.shape == (2, 30)
    assert (weights[0, :, 10:] == 0).all() and (weights[0, :, :, 10:] == 0).all()
    want = torch.einsum("hij,jhd->ihd", weights[1].double().clamp(min=0) * 2, v[10:].double())
    torch.testing.assert_close(out[10:].double(), want, rtol=2e-2, atol=2e-2)


def test_block_table_raises():
    q, k, v = make_qkv("cpu", torch.float32, None, 4, 4)
    starts = int32([0, 4], "cpu")
    with pytest.raises(NotImplementedError, match=r"`block_table` has shape \(1, 2\).*gather"):
        flash_attn_varlen_func(q, k, v, starts, starts, 4, 4, block_table=torch.zeros(1, 2, dtype=torch.int32))


@pytest.mark.parametrize("shape", [(2, 5, 2, 4, 8), (5, 8)])
def test_a_tensor_that_is_not_stacked_raises(shape):
    with pytest.raises(ValueError, match=r"`qkv` has shape .*\(\.\.\., 3, H, D\)"):
        flash_attn_qkvpacked_func(torch.zeros(shape))


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"softcap": float("nan")}, ValueError, ["`softcap`", "nan"]),
        ({"window_size": (float("nan"), 0)}, TypeError, ["`window_size`", "nan", "integers"]),
        ({"window_size": (-2.5, -1)}, TypeError, ["`window_size`", "-2.5", "integers"]),
        ({"window_size": 3}, TypeError, ["`window_size` is 3", "(left, right)"]),
        ({"deterministic": "no"}, TypeError, ["`deterministic` is 'no'", "True or False"]),
        ({"q": [1.0]}, TypeError, ["`q` is a list", "torch.Tensor"]),
        ({"q": torch.zeros(1, 5, 2, 12), "k": torch.zeros(1, 5, 2, 14)}, ValueError, ["`k`", "14", "`q` 12", "equal"]),
        ({"v": torch.zeros(1, 5, 2, 257)}, ValueError, ["HEAD_DIM", "`v`", "257", "256"]),
        (
            dict.fromkeys("qkv", torch.zeros(1, 5, 2, 12)) | {"dropout_p": "0.1", "return_attn_probs": True},
            TypeError,
            ["`dropout_p` is '0.1'"],
        ),
        ({"return_attn_probs": "False"}, TypeError, ["`return_attn_probs` is 'False'"]),
        ({"softmax_scale": "x"}, TypeError, ["`softmax_scale` is 'x'"]),
        (dict.fromkeys("qkv", torch.zeros(1, 5, 2, 0)), ValueError, ["head_dim 0"]),
        ({"q": torch.zeros(())}, ValueError, ["`q` has shape ()"]),
    ],
)
def test_bad_values_are_not_swallowed(changes, error, words):
    given = dict(zip("qkv", make_qkv("cpu", torch.float32, 1, 5, 5), strict=True)) | changes
    with pytest.raises(error, match="hf_flash") as caught:
        hf_flash.flash_attn_func(**given)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("longest, error", [(4.9, TypeError), (True, TypeError), ("5", TypeError), (-1, ValueError)])
def test_bad_lengths_are_not_swallowed(longest, error):
    """Rounded down, they would leave rows out."""
    q, k, v = make_qkv("cpu", torch.float32, None, 9, 9)
    starts = int32([0, 4, 9], "cpu")
    with pytest.raises(error, match="`max_seqlen_q`"):
        hf_flash.flash_attn_varlen_func(q, k, v, starts, starts, longest, 5)
    out = hf_flash.flash_attn_varlen_func(q, k, v, starts, starts, torch.tensor(5), None)
    assert torch.equal(out, hf_flash.flash_attn_varlen_func(q, k, v, starts, starts, 5, 5))
