"""The specification itself, against what others published and PyTorch computes."""

import math
import random

import pytest
import torch
from attention_rule import int32, make_qkv, seed_tensor

from hf_flash.reference import dropout_keep, dropout_mask, reference_attention

# Philox4x32-7 known answers of the Random123 library: (counter, key) -> words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def philox_7(counter, key):
    """The generator in Python's own integers, as the paper states it."""
    c, (k0, k1) = list(counter), key
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k0, b % 2**32, a >> 32 ^ c[3] ^ k1, a % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return tuple(c)


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox_7(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_dropout_mask_is_the_definition_element_by_element(seed):
    batch, heads, rows, cols, keep = 2, 3, 35, 50, 200
    mask = dropout_mask(torch.tensor([seed]), batch, heads, rows, cols, keep)
    key = (seed % 2**32, seed % 2**64 >> 32)
    pick = random.Random(seed)
    for _ in range(400):
        b, h, i, j = (pick.randrange(n) for n in (batch, heads, rows, cols))
        word = philox_7((4 * (i % 8 // 2) + j % 8 // 2, i // 16, j // 16, b * heads + h), key)[2 * (i % 2) + j % 2]
        byte = word >> 8 * (2 * (i // 8 % 2) + j // 8 % 2) & 0xFF
        assert mask[b, h, i, j].item() == (byte < keep)


def test_dropout_mask_of_part_is_part_of_the_mask():
    seed = torch.tensor([7])
    whole = dropout_mask(seed, 2, 2, 100, 90, 128)
    assert torch.equal(dropout_mask(seed, 2, 2, 33, 17, 128), whole[:, :, :33, :17])
    assert dropout_mask(seed, 2, 2, 0, 5, 128).shape == (2, 2, 0, 5)


@pytest.mark.parametrize(
    "p, keep", [(0.0, 256), (0.1, 230), (0.5, 128), (0.9, 26), (0.999, 1), (0.001, 256), (1 / 512, 256), (0.002, 255)]
)
def test_dropout_keep(p, keep):
    assert dropout_keep(p) == keep


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_scaled_dot_product_attention(causal):
    q, k, v = (t.double() for t in make_qkv("cpu", torch.float64, 2, 19, 26, heads=4, heads_k=2, head_dim_v=24))
    bias = torch.randn(1, 4, 19, 26, dtype=torch.float64)
    visible = torch.ones(19, 26, dtype=torch.bool).tril(26 - 19) if causal else torch.ones(19, 26, dtype=torch.bool)
    out, lse = reference_attention(q, k, v, causal=causal, bias=bias, scale=0.2)
    score = bias.masked_fill(~visible, -math.inf)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=score, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2), rtol=1e-12, atol=1e-12)
    scores = 0.2 * heads_first[0] @ heads_first[1].repeat_interleave(2, 1).mT + score
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_reference_gradients_are_those_of_its_values():
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, 2, 3, generator=g, dtype=torch.float64).requires_grad_() for n in (5, 6, 6))
    sink = torch.randn(2, generator=g, dtype=torch.float64).requires_grad_()
    bias = torch.randn(2, 1, 5, 1, generator=g, dtype=torch.float64).requires_grad_()

    def f(q, k, v, sink, bias):
        out, lse = reference_attention(
            q, k, v, sink=sink, bias=bias, causal=True, softcap=2.0, alibi_slopes=torch.tensor([0.3, 0.7]),
            key_range=int32([[1, 5], [0, 0]], "cpu"), query_range=int32([[0, 4], [1, 5]], "cpu"),
            dropout_p=0.3, dropout_seed=seed_tensor(5, "cpu"),
        )  # fmt: skip
        return out, lse.clamp(min=-1e9)

    assert torch.autograd.gradcheck(f, (q, k, v, sink, bias))


def test_reference_gives_zeros_and_no_nan_where_nothing_is_seen():
    q, k, v = (t.requires_grad_() for t in make_qkv("cpu", torch.float32, 1, 4, 3))
    out, lse = reference_attention(q, k, v, mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    (out.sum() + lse.masked_fill(lse.isinf(), 0).sum()).backward()
    assert (out == 0).all() and (lse == -math.inf).all()
    assert all((t.grad == 0).all() for t in (q, k, v))
