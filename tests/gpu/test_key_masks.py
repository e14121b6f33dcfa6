"""Masks of keys alone, (B, 1, 1, Sk): padding with holes, which the kernels look at where they look at the ranges."""

import re

import pytest
import torch
from attention_rule import check, int32, make_qkv, random_like, run, seed_tensor
from cuda_graphs import captured
from served_kernels import kernels_of

from hf_flash import flash_attention

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
LENGTH = 333  # rows of such a mask begin at no multiple of 4 bytes


def key_mask(kind, batch=3, length=LENGTH):
    """bool (B, 1, 1, Sk). The first sequence sees something in every kind."""
    keys = torch.arange(length)
    mask = {
        "random": torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) > 0.4,
        "one hole": keys[None] != torch.tensor([[0], [130], [length - 1]]),
        "whole tiles": ((keys < 128) | (keys >= 256)) & (keys[None] % 2 < torch.tensor([[2], [1], [2]])),
        "nothing": (keys < torch.tensor([[length], [0], [200]])),
        "ends": (keys >= torch.tensor([[0], [70], [129]])) & (keys < torch.tensor([[300], [length], [200]])),
    }[kind]
    return mask[:, None, None].cuda()


KINDS = pytest.mark.parametrize("kind", ["random", "one hole", "whole tiles", "nothing", "ends"])


@DTYPES
@KINDS
@pytest.mark.parametrize("head_dim", [64, 128])
def test_masks_of_keys(dtype, head_dim, kind):
    q, k, v = make_qkv("cuda", dtype, 3, 150, LENGTH, heads=4, heads_k=2, head_dim=head_dim)
    check(q, k, v, mask=key_mask(kind), dropout_p=0.1, dropout_seed=seed_tensor(3, "cuda"), small=True)
    check(q, k, v, mask=key_mask(kind), causal=True, small=True)
    check(q, k, v, mask=key_mask(kind)[1:2], window=(90, 40), small=True)  # one row for all sequences


@DTYPES
@KINDS
@pytest.mark.parametrize("head_dim", [96, 192, 256])
def test_masks_of_keys_of_other_head_dims(dtype, head_dim, kind):
    q, k, v = make_qkv("cuda", dtype, 3, 70, LENGTH, head_dim=head_dim)
    for dropout in ({}, {"dropout_p": 0.2, "dropout_seed": seed_tensor(3, "cuda")}):
        check(q, k, v, mask=key_mask(kind), **dropout, small=True)


@DTYPES
@KINDS
def test_masks_of_keys_beside_other_terms(dtype, kind):
    q, k, v = make_qkv("cuda", dtype, 3, 128, 328, heads=2, head_dim=64)
    bias = random_like(torch.empty(1, 2, 128, 328, device="cuda"), dtype, 5)
    slopes = torch.tensor([0.25, 0.01], device="cuda")
    mask = key_mask(kind, length=328)
    dropout = {"dropout_p": 0.1, "dropout_seed": seed_tensor(3, "cuda")}
    check(q, k, v, mask=mask, bias=bias, small=True)
    check(q, k, v, mask=mask, bias=bias, causal=True, **dropout, small=True)
    check(q, k, v, mask=mask, alibi_slopes=slopes, **dropout, small=True)
    check(q, k, v, mask=mask, softcap=2.0, sink=torch.tensor([0.3, -1.0], device="cuda"), small=True)


@DTYPES
def test_masks_of_keys_meet_ranges_and_long_calls(dtype):
    """Ranges inside what the mask shows and across it; query tiles of 80 where the GPU has them."""
    q, k, v = make_qkv("cuda", dtype, 3, 530, 800, heads=2, head_dim=128)
    ranges = {"key_range": int32([[0, 800], [131, 600], [100, 400]], "cuda"), "deterministic": True}
    for kind in ("random", "one hole", "nothing"):
        check(q, k, v, mask=key_mask(kind, length=800), **ranges, small=True)
    rows = int32([[0, 530], [7, 300], [9, 9]], "cuda")
    check(q, k, v, mask=key_mask("random", length=800), query_range=rows, small=True)


@DTYPES
def test_masks_of_keys_in_a_packed_batch(dtype):
    """Columns count from each sequence's start."""
    q, k, v = make_qkv("cuda", dtype, None, 301, 420, heads=2, head_dim=64)
    options = {
        "cu_seqlens_q": int32([0, 100, 101, 301], "cuda"),
        "cu_seqlens_k": int32([0, 140, 160, 420], "cuda"),
        "max_seqlen_q": 200,
        "max_seqlen_k": 260,
    }
    for kind in ("random", "one hole"):
        check(q, k, v, mask=key_mask(kind, length=260), **options, small=True)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_mask_without_holes_changes_no_bit(dtype, head_dim, offset):
    """All true, as none; padding, with its range or without, as the range alone. Wherever its rows begin."""
    q, k, v = make_qkv("cuda", dtype, 2, 200, 240, heads=2, head_dim=head_dim)
    begin, end = torch.tensor([[0], [33]]), torch.tensor([[240], [207]])
    wide = torch.zeros(2, 1, 1, 240 + offset, dtype=torch.bool, device="cuda")
    mask = wide[..., offset:]
    keys = torch.arange(240)
    mask[:] = ((keys >= begin) & (keys < end))[:, None, None]
    key_range = torch.cat([begin, end], 1).to(torch.int32).cuda()
    options = {"dropout_p": 0.1, "dropout_seed": seed_tensor(3, "cuda"), "deterministic": True}
    for masked, without in (
        ({"mask": mask, "key_range": key_range}, {"key_range": key_range}),
        ({"mask": mask}, {"key_range": key_range}),
        ({"mask": torch.ones_like(mask)}, {}),
    ):
        got, want = run(q, k, v, options | masked), run(q, k, v, options | without)
        for name, t in want.items():
            assert torch.equal(got[name], t), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_mask_of_keys_takes_no_other_kernel(head_dim, dropout_p):
    """The kernels of the same call with a range, but for the template argument that there may be such a mask."""
    q, k, v = (t.requires_grad_() for t in make_qkv("cuda", torch.bfloat16, 2, 700, 700, head_dim=head_dim))

    def step(**options):
        flash_attention(q, k, v, dropout_p=dropout_p, **options).sum().backward()

    def own_kernels(**options):
        names = [name for name in kernels_of(step, **options) if "hf_flash" in name]
        return sorted(re.sub(r"(Traits<[^>]*), \w+>", r"\1>", name) for name in names)

    key_range = int32([[0, 700], [0, 500]], "cuda")
    by_range = own_kernels(key_range=key_range)
    assert any("forward_kernel" in name for name in by_range)
    mask = key_mask("random", 2, 700)
    assert own_kernels(key_range=key_range, mask=mask) == by_range
    alone = own_kernels(mask=mask)  # each pass finds the range of what the mask shows
    assert sum("key_ranges" in name for name in alone) == 2
    assert [name for name in alone if "key_ranges" not in name] == by_range


@pytest.mark.parametrize("length, shown", [
    (300, (0, 0)), (300, (0, 1)), (300, (299, 300)), (300, (130, 131)), (300, (0, 300)), (300, (31, 258)), (2, (1, 2)),
    (1023, (1022, 1023)), (1025, (1024, 1025)), (2500, (1000, 1100)), (2500, (1, 2499)), (2500, (2060, 2100)),
])  # fmt: skip
def test_what_lies_outside_of_what_a_mask_shows_is_never_used(length, shown):
    """As outside a key_range: NaN there changes nothing. Masks of one row for all sequences too."""
    q, k, v = make_qkv("cuda", torch.bfloat16, 2, 100, length, heads=2, head_dim=64)
    key_range = int32([list(shown), [length // 15, length - length // 15]], "cuda")
    keys = torch.arange(length, device="cuda")
    mask = ((keys >= key_range[:, :1]) & (keys < key_range[:, 1:]))[:, None, None]
    for t in (k, v):
        t.masked_fill_(~mask[:, 0, 0, :, None, None], float("nan"))
    options = {"dropout_p": 0.1, "dropout_seed": seed_tensor(3, "cuda"), "deterministic": True}
    got, want = run(q, k, v, options | {"mask": mask}), run(q, k, v, options | {"key_range": key_range})
    for name, t in want.items():
        assert not t.isnan().any() and torch.equal(got[name], t), name
    both = [t[:1].expand(2, -1, -1, -1) for t in (q, k, v)]
    got = run(*both, {"mask": mask[:1], "deterministic": True})
    want = run(*both, {"key_range": key_range[:1].expand(2, 2).contiguous(), "deterministic": True})
    for name, t in want.items():
        assert torch.equal(got[name], t), name


def test_a_replayed_graph_sees_what_the_mask_shows_then():
    q, k, v = (t.requires_grad_() for t in make_qkv("cuda", torch.bfloat16, 2, 300, 300, heads=2, head_dim=64))
    mask = torch.zeros(2, 1, 1, 300, dtype=torch.bool, device="cuda")
    mask[..., 140:150] = True

    def step():
        out = flash_attention(q, k, v, mask=mask, deterministic=True)
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    graph, replayed = captured(step)
    mask[0, ..., 3:290] = True  # wider, of one sequence
    graph.replay()
    want = step()
    assert all(torch.equal(a, b) for a, b in zip(replayed, want, strict=True))
    mask[0, ..., :140] = False
    assert not torch.equal(step()[0], want[0])
