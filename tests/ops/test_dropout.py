"""Dropout: one mask, a function of seed and place, bit by bit the reference's wherever it is used."""

import itertools

import pytest
import torch
from attention_rule import check, int32, make_qkv, run, seed_tensor

import hf_flash
from hf_flash import flash_attention
from hf_flash.attention import draw_seed
from hf_flash.ops import Numbers, Tensors, attention
from hf_flash.reference import dropout_keep, dropout_mask


def mask_in_forward(seed, batch, heads, rows, cols, p, dtype, **options):
    """q = 0 and v the unit matrix: out is the dropped weights. Queries and keys of a packed batch start at 0."""
    q = torch.zeros(batch, rows, heads, 8, device=seed.device, dtype=dtype)
    k = torch.zeros(batch, cols, heads, 8, device=seed.device, dtype=dtype)
    v = torch.eye(cols, -(-cols // 8) * 8, device=seed.device, dtype=dtype)[None, :, None].expand(batch, -1, heads, -1)
    out = flash_attention(q, k, v, dropout_p=p, dropout_seed=seed, **options)
    return out.transpose(1, 2)[..., :cols]


@pytest.mark.parametrize("rows, cols", [(1, 1), (16, 16), (50, 40), (131, 250)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_forward_drops_what_the_reference_drops(device, dtype, rows, cols, p):
    for value in (0, -1, 0x123456789ABCDEF):
        seed = seed_tensor(value, device)
        want = dropout_mask(seed, 2, 3, rows, cols, dropout_keep(p))
        got = mask_in_forward(seed, 2, 3, rows, cols, p, dtype)
        assert torch.equal(got != 0, want)
        kept = got[want].double()
        torch.testing.assert_close(kept, torch.full_like(kept, 256 / dropout_keep(p) / cols), rtol=1e-2, atol=0)


@pytest.mark.parametrize("rows, cols", [(16, 16), (40, 50), (250, 131)])
def test_backward_drops_the_same_for_dv(device, dtype, rows, cols):
    """With dout the unit matrix, dv is the dropped weights, transposed."""
    seed, wide = seed_tensor(987654321, device), -(-rows // 8) * 8
    q = torch.zeros(2, rows, 2, 8, device=device, dtype=dtype)
    k = torch.zeros(2, cols, 2, 8, device=device, dtype=dtype)
    v = torch.zeros(2, cols, 2, wide, device=device, dtype=dtype, requires_grad=True)
    dout = torch.eye(rows, wide, device=device, dtype=dtype)[None, :, None].expand(2, -1, 2, -1)
    flash_attention(q, k, v, dropout_p=0.3, dropout_seed=seed).backward(dout)
    want = dropout_mask(seed, 2, 2, rows, cols, dropout_keep(0.3))
    assert torch.equal(v.grad.permute(0, 2, 3, 1)[:, :, :rows] != 0, want)


@pytest.mark.parametrize("rows, cols", [(16, 16), (60, 50), (131, 250)])
def test_backward_drops_the_same_for_dq_and_dk(device, dtype, rows, cols):
    """dq with k the unit matrix, and dk with q it, are dS: p * mask * 256 / keep once lse's gradient takes D away."""
    seed, p = seed_tensor(-4321, device), 0.25
    want = dropout_mask(seed, 1, 2, rows, cols, dropout_keep(p))
    size = 256
    v = torch.zeros(1, cols, 2, 8, device=device, dtype=dtype)
    v[..., 0] = 1  # dP = 1
    dout = torch.zeros(1, rows, 2, 8, device=device, dtype=dtype)
    dout[..., 0] = 1

    def unit(n):
        return torch.eye(n, size, device=device, dtype=dtype)[None, :, None].expand(1, -1, 2, -1).contiguous()

    def zeros(n):
        return torch.zeros(1, n, 2, size, device=device, dtype=dtype)

    for q, k, wanted in ((zeros(rows), unit(cols), "q"), (unit(rows), zeros(cols), "k")):
        q, k = q.requires_grad_(), k.requires_grad_()
        out, lse = flash_attention(q, k, v, dropout_p=p, dropout_seed=seed, scale=1.0, return_lse=True)
        dlse = out.detach()[..., 0].float().mT  # D = sum of dout * out
        dq, dk = torch.autograd.grad([out, lse], [q, k], [dout, dlse])
        ds = dq.transpose(1, 2)[..., :cols] if wanted == "q" else dk.permute(0, 2, 3, 1)[:, :, :rows]
        assert torch.equal(ds > 0.5 / cols, want)


def test_the_mask_operator(device):
    for seed, (rows, cols), keep in itertools.product(
        (0, -7, 2**62), ((1, 1), (33, 17), (64, 200)), (1, 128, 255, 256)
    ):
        got = torch.ops.hf_flash.dropout_mask(seed_tensor(seed, device), 2, 3, rows, cols, keep)
        assert torch.equal(got, dropout_mask(seed_tensor(seed, device), 2, 3, rows, cols, keep))


def test_other_terms_leave_the_mask_alone(device, plain_dtype):
    seed = seed_tensor(5, device)
    want = dropout_mask(seed, 3, 2, 70, 90, dropout_keep(0.4))
    i, j = torch.arange(70, device=device)[:, None], torch.arange(90, device=device)
    key_range = int32([[0, 90], [17, 60], [33, 34]], device)
    got = mask_in_forward(seed, 3, 2, 70, 90, 0.4, plain_dtype, causal=True, window=(41, -1), key_range=key_range)
    begin, end = key_range.view(3, 2, 1, 1, 1).unbind(1)
    seen = (j >= begin) & (j < end) & (j - i - 20 <= 0) & (j - i - 20 >= -41)
    assert torch.equal(got != 0, want & seen)


def test_rate(device):
    for keep in (26, 128, 230, 255):
        mask = torch.ops.hf_flash.dropout_mask(seed_tensor(keep, device), 4, 4, 256, 256, keep)
        share, n = keep / 256, mask.numel()
        assert abs(mask.double().mean().item() - share) < 5 * (share * (1 - share) / n) ** 0.5
        for dim in range(4):  # each slice too, not only the whole
            others = [d for d in range(4) if d != dim]
            slices = mask.double().mean(others)
            assert (slices - share).abs().max() < 6 * (share * (1 - share) / (n / mask.shape[dim])) ** 0.5


def test_elements_are_independent(device):
    """Neighbours in every direction, planes and seeds agree as often as chance lets them."""
    keep = 128
    mask = torch.ops.hf_flash.dropout_mask(seed_tensor(11, device), 3, 3, 256, 256, keep)
    other = torch.ops.hf_flash.dropout_mask(seed_tensor(12, device), 3, 3, 256, 256, keep)
    high = torch.ops.hf_flash.dropout_mask(seed_tensor(11 + 2**32, device), 3, 3, 256, 256, keep)
    pairs = [(mask, other), (mask, high), (mask[:-1], mask[1:]), (mask[:, :-1], mask[:, 1:])]
    for step in (1, 2, 4, 8, 16, 32):
        pairs += [(mask[..., :-step], mask[..., step:]), (mask[:, :, :-step], mask[:, :, step:])]
    pairs.append((mask, mask.mT))
    for a, b in pairs:
        agree = (a == b).double().mean().item()
        assert abs(agree - 0.5) < 5 * 0.5 / a.numel() ** 0.5


def test_packed_drops_what_padded_drops(device, dtype):
    """Sequences of a packed batch, and the same ones right-padded with ranges, give the same results."""
    lengths_q, lengths_k = (50, 0, 33), (70, 20, 33)
    seed = seed_tensor(31337, device)
    q, k, v = make_qkv(device, dtype, 3, 50, 70, heads=4, heads_k=2)
    where_q = torch.arange(50, device=device) < int32(lengths_q, device)[:, None]
    where_k = torch.arange(70, device=device) < int32(lengths_k, device)[:, None]
    cu_q, cu_k = (int32([sum(n[:b]) for b in range(4)], device) for n in (lengths_q, lengths_k))
    dropout = {"dropout_p": 0.3, "dropout_seed": seed, "causal": True}
    dout = torch.randn(3, 50, 4, 32).to(device, dtype)
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 50, "max_seqlen_k": 70}
    got = run(q[where_q], k[where_k], v[where_k], packed | dropout, dout=dout[where_q])
    padded = {
        "query_range": int32([[0, n] for n in lengths_q], device),
        "key_range": int32([[0, n] for n in lengths_k], device),
        "query_offset": int32([b - a for a, b in zip(lengths_q, lengths_k, strict=True)], device),
    }
    want = run(q, k, v, padded | dropout, dout=dout)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for name, where in (("out", where_q), ("dq", where_q), ("dk", where_k), ("dv", where_k)):
        torch.testing.assert_close(got[name], want[name][where], **tolerance)
    torch.testing.assert_close(got["lse"], want["lse"].mT[where_q].mT, **tolerance)


def test_the_same_seed_drops_the_same_and_another_does_not(device, plain_dtype):
    seed = seed_tensor(1, device)
    first = mask_in_forward(seed, 1, 2, 64, 64, 0.5, plain_dtype)
    assert torch.equal(first, mask_in_forward(seed.clone(), 1, 2, 64, 64, 0.5, plain_dtype))
    assert not torch.equal(first, mask_in_forward(seed + 1, 1, 2, 64, 64, 0.5, plain_dtype))


def test_manual_seed_reproduces(device, plain_dtype):
    q, k, v = make_qkv(device, plain_dtype, 1, 40, 40)
    torch.manual_seed(123)
    first = flash_attention(q, k, v, dropout_p=0.5), flash_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(123)
    again = flash_attention(q, k, v, dropout_p=0.5), flash_attention(q, k, v, dropout_p=0.5)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


def test_a_restored_generator_repeats(device, plain_dtype):
    """What activation checkpointing relies on: the generator's state alone decides, wherever it stands."""
    q, k, v = make_qkv(device, plain_dtype, 1, 40, 40)
    generator = torch.random if device == "cpu" else torch.cuda
    torch.manual_seed(5)
    torch.rand(7, device=device)
    state = generator.get_rng_state()
    first = flash_attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(generator.get_rng_state(), state)
    generator.set_rng_state(state)
    assert torch.equal(flash_attention(q, k, v, dropout_p=0.5), first)
    torch.manual_seed(6)
    torch.rand(7, device=device)
    assert not torch.equal(flash_attention(q, k, v, dropout_p=0.5), first)


def test_seeds_of_a_gpu_are_drawn_on_the_host(monkeypatch):
    """Each moves the generator on as torch's kernels do; neighbouring generators' seeds and streams do not meet."""

    class Generator:
        def __init__(self, seed):
            self.initial_seed, self.offset = lambda: seed, 0
            self.get_offset, self.set_offset = lambda: self.offset, lambda offset: setattr(self, "offset", offset)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen = set()
    for seed in (*range(100), 2**63, 2**64 - 1, -5):
        generator = Generator(seed)
        monkeypatch.setattr(torch.cuda, "default_generators", [None, generator])
        for n in range(20):
            tensor, value = draw_seed(torch.device("cuda", 1))
            assert tensor is None
            assert -(2**63) <= value < 2**63
            assert generator.offset == 4 * (n + 1)
            seen.add(value)
    assert len(seen) == 20 * 103


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_a_seed_by_value_drops_what_its_tensor_drops(device, plain_dtype, seed):
    qkv = [t.requires_grad_() for t in make_qkv(device, plain_dtype, 2, 40, 50)]
    results = []
    numbers = Numbers(1.0, dropout_keep=100, deterministic=True)
    for tensors, value in ((Tensors(dropout_seed=seed_tensor(seed, device)), 0), ((), seed)):
        out, _ = attention(*qkv, numbers._replace(dropout_seed_value=value), tensors)
        results.append((out, *torch.autograd.grad(out.sum(), qkv)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_dropout_draws_no_seed(device, plain_dtype):
    q, k, v = make_qkv(device, plain_dtype, 1, 8, 8)
    before = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    flash_attention(q, k, v)
    after = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(before, after)


def test_a_rate_that_rounds_to_nothing_warns(device, plain_dtype):
    q, k, v = make_qkv(device, plain_dtype, 1, 8, 8)
    with pytest.warns(UserWarning, match="dropout_p=0.001"):
        out = flash_attention(q, k, v, dropout_p=0.001)
    assert torch.equal(out, flash_attention(q, k, v))


def test_mean_over_seeds_is_attention_without_dropout(device, plain_dtype):
    q, k, v = make_qkv(device, plain_dtype, 1, 12, 20)
    plain = flash_attention(q, k, v).double()
    runs = [flash_attention(q, k, v, dropout_p=0.3, dropout_seed=seed_tensor(n, device)).double() for n in range(400)]
    runs = torch.stack(runs)
    spread = runs.std(0) / len(runs) ** 0.5
    assert ((runs.mean(0) - plain).abs() < 6 * spread + 2e-3).all()


def test_dropout_with_everything_else(device, dtype):
    q, k, v = make_qkv(device, dtype, 2, 70, 81, heads=4, heads_k=1)
    bias = torch.randn(2, 4, 70, 81).to(device, dtype)
    check(q, k, v, dropout_p=0.5, dropout_seed=seed_tensor(2, device), bias=bias, causal=True, deterministic=True)


def test_public_names_agree():
    assert hf_flash.attention.dropout_keep(0.1) == dropout_keep(0.1) == 230
