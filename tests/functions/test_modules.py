"""The alpha release's modules against PyTorch's own multi-head attention, with padding of every kind."""

import copy
import io

import pytest
import torch
from attention_rule import int32, make_qkv
from torch import nn

from hf_flash import FlashAttention, FlashMHA, flash_attention

PADDINGS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 0, 0]],
    "none": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "all": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]],
}


def pair(**options):
    """FlashMHA and torch's module with the same weights."""
    ours = FlashMHA(32, 4, **options, dtype=torch.float64)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.Wqkv.weight)
        theirs.in_proj_bias.copy_(ours.Wqkv.bias)
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
        theirs.out_proj.bias.copy_(ours.out_proj.bias)
    return ours, theirs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_mha_is_torchs_multihead_attention(padding, causal):
    keep = torch.tensor(PADDINGS[padding], dtype=torch.bool)
    ours, theirs = pair(causal=causal)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    weight = torch.randn(2, 7, 32, dtype=torch.float64)

    def results(run):
        y = x.clone().requires_grad_()
        out = run(y)
        (out.masked_fill(~keep[..., None], 0) * weight).sum().backward()
        return out.detach(), y.grad

    out, dx = results(lambda y: ours(y, key_padding_mask=keep)[0])
    above = ~torch.ones(7, 7, dtype=torch.bool).tril() if causal else torch.zeros(7, 7, dtype=torch.bool)
    # torch's module gives NaN where a row sees nothing: such rows get one key here, and only the others count.
    hidden = (~keep[:, None] | above).repeat_interleave(4, 0)
    hidden[..., 0] &= ~hidden.all(-1)
    want, want_dx = results(lambda y: theirs(y, y, y, attn_mask=hidden, need_weights=False)[0])
    torch.testing.assert_close(out[keep], want[keep], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out[~keep], ours.out_proj.bias.detach().expand_as(out[~keep]))  # padding sees nothing
    torch.testing.assert_close(dx, want_dx, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.Wqkv.weight.grad, theirs.in_proj_weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.out_proj.weight.grad, theirs.out_proj.weight.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", ["right", "left", "all"])
def test_padding_may_hold_anything(device, dtype, padding):
    keep = torch.tensor(PADDINGS[padding], dtype=torch.bool, device=device)
    qkv = torch.randn(2, 7, 3, 2, 16).to(device, dtype)
    results = []
    for filler in (0.0, float("nan")):
        filled = qkv.masked_fill(~keep[..., None, None, None], filler).requires_grad_()
        out, weights = FlashAttention()(filled, key_padding_mask=keep, causal=True)
        (grad,) = torch.autograd.grad(out.float().square().sum(), filled)
        assert weights is None and (out[~keep] == 0).all() and (grad[~keep] == 0).all()
        results.append((out, grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0 if device == "cpu" else 1e-2)


def test_packed_is_each_sequence_alone(device, dtype):
    qkv, starts = torch.stack(make_qkv(device, dtype, None, 30, 30), dim=1), int32([0, 11, 30], device)
    inner = FlashAttention(softmax_scale=0.2)
    for longest in (19, None):
        out, _ = inner(qkv, cu_seqlens=starts, max_s=longest, causal=True)
        for begin, end in ((0, 11), (11, 30)):
            alone, _ = inner(qkv[None, begin:end], causal=True)
            torch.testing.assert_close(out[begin:end], alone[0], rtol=1e-2, atol=1e-3)


def test_nothing_to_attend_to():
    model = FlashMHA(16, 2)
    assert model(torch.zeros(2, 0, 16), torch.ones(2, 0, dtype=torch.bool))[0].shape == (2, 0, 16)
    out, _ = FlashAttention()(torch.zeros(0, 3, 2, 8), cu_seqlens=int32([0], "cpu"))
    assert out.shape == (0, 2, 8)
    mask = torch.ones(2, 2, dtype=torch.bool)
    qkv = torch.randn(3, 3, 2, 8)
    packed, _ = FlashAttention()(qkv, cu_seqlens=int32([0, 2, 3], "cpu"), attn_mask=mask)  # of the longest's shape
    assert torch.equal(packed, FlashAttention()(qkv, cu_seqlens=int32([0, 2, 3], "cpu"))[0])


def test_attn_mask(device, dtype):
    qkv = torch.randn(2, 9, 3, 2, 16).to(device, dtype)
    mask = torch.rand(9, 9, device=device) > 0.4
    out, _ = FlashAttention()(qkv, attn_mask=mask)
    assert torch.equal(out, flash_attention(*qkv.unbind(2), mask=mask))
    keep = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 0, 0], [1] * 9], dtype=torch.bool, device=device)
    both, _ = FlashAttention()(qkv, key_padding_mask=keep, attn_mask=mask)
    want = flash_attention(*qkv.unbind(2), mask=mask & keep[:, None, None])
    torch.testing.assert_close(both[keep], want[keep], rtol=1e-2, atol=1e-3)


def test_dropout_follows_the_mode(device, plain_dtype):
    qkv = torch.randn(2, 40, 3, 2, 16, device=device).to(plain_dtype)
    inner = FlashAttention(attention_dropout=0.5)
    plain = flash_attention(*qkv.unbind(2))
    assert torch.equal(inner.eval()(qkv)[0], plain)
    assert not torch.equal(inner.train()(qkv)[0], plain)


def test_the_first_alphas_name_of_the_scale():
    qkv = torch.randn(1, 5, 3, 1, 8)
    assert torch.equal(FlashAttention(softmax_temp=0.5)(qkv)[0], FlashAttention(softmax_scale=0.5)(qkv)[0])
    with pytest.raises(ValueError, match="two names of one argument"):
        FlashAttention(softmax_scale=1.0, softmax_temp=1.0)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="`qkv` is a NoneType"):
        FlashAttention()(None)


def test_weights_are_refused():
    with pytest.raises(NotImplementedError, match=r"`need_weights` is True.*need_weights=False"):
        FlashMHA(16, 2)(torch.zeros(1, 3, 16), need_weights=True)


def test_checkpoints_copy_and_load():
    model = FlashMHA(32, 4)
    assert sorted(model.state_dict()) == ["Wqkv.bias", "Wqkv.weight", "out_proj.bias", "out_proj.weight"]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = FlashMHA(32, 4)
    other.load_state_dict(torch.load(file))
    x = torch.randn(1, 5, 32)
    assert torch.equal(model(x)[0], other(x)[0])
    assert torch.equal(model(x)[0], copy.deepcopy(model)(x)[0])
    assert sorted(FlashMHA(32, 4, bias=False).state_dict()) == ["Wqkv.weight", "out_proj.weight"]


def stacked(*shape):
    return torch.zeros(shape)


BAD = {
    "layout": (lambda: FlashAttention()(stacked(1, 5, 2, 4, 8)), ValueError, r"`qkv`.*\(1, 5, 2, 4, 8\)"),
    "packed layout": (
        lambda: FlashAttention()(stacked(1, 5, 3, 1, 8), cu_seqlens=int32([0, 5], "cpu")),
        ValueError,
        "cu_seqlens",
    ),
    "padding and packing": (
        lambda: FlashAttention()(stacked(5, 3, 1, 8), torch.ones(1, 5).bool(), cu_seqlens=int32([0, 5], "cpu")),
        ValueError,
        "no padding",
    ),
    "mask dtype": (lambda: FlashAttention()(stacked(1, 5, 3, 1, 8), torch.ones(1, 5)), TypeError, "float32.*bool"),
    "mask type": (lambda: FlashAttention()(stacked(1, 5, 3, 1, 8), [[1] * 5]), TypeError, "a list.*bool"),
    "attn_mask dtype": (
        lambda: FlashAttention()(stacked(1, 5, 3, 1, 8), attn_mask=torch.ones(5, 5)),
        TypeError,
        "`attn_mask` is torch.float32.*bool",
    ),
    "max_s without packing": (
        lambda: FlashAttention()(stacked(1, 5, 3, 1, 8), max_s=5),
        ValueError,
        "`max_s` is 5 without `cu_seqlens`",
    ),
    "mask shape": (
        lambda: FlashAttention()(stacked(1, 5, 3, 1, 8), torch.ones(1, 4).bool()),
        ValueError,
        r"\(1, 4\).*\(1, 5\)",
    ),
    "batch_first": (lambda: FlashMHA(16, 2, batch_first=False), ValueError, "`batch_first` is False"),
    "heads": (lambda: FlashMHA(20, 2), ValueError, "HEAD_DIM.*`embed_dim` 20.*10.*multiple of 8"),
    "no heads": (lambda: FlashMHA(16, 0), ValueError, "`num_heads` is 0.*positive integer"),
    "half heads": (lambda: FlashMHA(16, 2.0), ValueError, "`num_heads` is 2.0.*positive integer"),
    "heads do not divide": (lambda: FlashMHA(16, 3), ValueError, "HEAD_DIM.*16.*3"),
}


@pytest.mark.parametrize("call, error, sentence", BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
