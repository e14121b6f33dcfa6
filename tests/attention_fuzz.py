"""Random calls of the operator: ``draw(seed)`` chooses every argument, and the same seed gives the same call again."""

import os
import random
import sys

import pytest
import torch
from attention_rule import check, int32, seed_tensor

LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 47, 63, 64, 65, 80, 97, 127, 128, 129, 131, 192, 193, 257)


class Draw:
    """One random call: q, k, v, options, dout, drawn on the CPU so that every device gets the same numbers."""

    def __init__(self, seed, device, dtype, longest=160, head_dims=range(8, 257, 8)):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype
        r = self.rng
        self.lengths = [n for n in LENGTHS if n <= longest]
        self.batch = r.choice((1, 1, 2, 3))
        self.heads_k = r.choice((1, 1, 2, 3))
        self.heads = self.heads_k * r.choice((1, 1, 2, 3))
        small = [d for d in head_dims if d <= 128]
        self.head_dim = r.choice(small if small and r.random() < 0.8 else list(head_dims))
        self.head_dim_v = self.head_dim if r.random() < 0.7 else r.choice(small or list(head_dims))
        self.options = {}
        self.shape_packed() if r.random() < 0.3 else self.shape_padded()
        self.choose_scores()
        self.choose_visibility()
        if r.random() < 0.4:
            p = r.choice((0.01, 0.1, 0.5, 0.9, r.random()))
            self.options |= {"dropout_p": p, "dropout_seed": seed_tensor(r.getrandbits(64) - 2**63, device)}
        if r.random() < 0.3:
            self.options["scale"] = r.choice((1.0, 0.02, 0.3))
        if r.random() < 0.3:
            self.options["deterministic"] = r.random() < 0.5

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.device)

    def length(self):
        return self.rng.choice(self.lengths) if self.rng.random() < 0.5 else self.rng.randint(1, self.lengths[-1])

    def rows(self, first, heads, dim):
        """(*first, heads, dim) in one of the layouts that callers have."""
        layout = self.rng.choice(
            ("plain", "plain", "plain", "heads first", "slice", "unaligned", "strided", "expanded")
        )
        if layout == "heads first":
            t = self.normal(*first[:-1], heads, first[-1], dim).to(self.dtype).transpose(-3, -2)
        elif layout == "slice":
            t = self.normal(*first, heads, 3 * dim).to(self.dtype)[..., dim : 2 * dim]
        elif layout == "unaligned":
            numel = heads * dim
            for n in first:
                numel *= n
            t = self.normal(numel + 3).to(self.dtype)[3:].view(*first, heads, dim)
        elif layout == "strided":
            t = self.normal(*first, dim, heads).to(self.dtype).transpose(-2, -1)
        elif layout == "expanded":
            t = self.normal(*(1 for _ in first[:-1]), first[-1], 1, dim).to(self.dtype).expand(*first, heads, dim)
        else:
            t = self.normal(*first, heads, dim).to(self.dtype)
        return t

    def shape_padded(self):
        r = self.rng
        self.seqlen_q = self.length()
        self.seqlen_k = self.seqlen_q if r.random() < 0.5 else self.length()
        self.first_q, self.first_k = (self.batch, self.seqlen_q), (self.batch, self.seqlen_k)
        if r.random() < 0.4:
            self.options["key_range"] = self.ranges(self.seqlen_k)
        if r.random() < 0.3:
            self.options["query_range"] = self.ranges(self.seqlen_q)
        self.finish_rows()

    def ranges(self, length):
        pairs = [sorted((self.rng.randint(0, length), self.rng.randint(0, length))) for _ in range(self.batch)]
        return int32([(0, length) if self.rng.random() < 0.2 else pair for pair in pairs], self.device)

    def shape_packed(self):
        r = self.rng
        lengths_q = [0 if r.random() < 0.1 else self.length() for _ in range(self.batch)]
        lengths_k = lengths_q if r.random() < 0.5 else [0 if r.random() < 0.1 else self.length() for _ in lengths_q]
        self.seqlen_q, self.seqlen_k = max(lengths_q) + r.choice((0, 0, 5)), max(lengths_k) + r.choice((0, 0, 3))
        for name, lengths in (("cu_seqlens_q", lengths_q), ("cu_seqlens_k", lengths_k)):
            ends = [sum(lengths[:n]) for n in range(self.batch + 1)]
            self.options[name] = int32(ends, self.device)
        self.options |= {"max_seqlen_q": self.seqlen_q, "max_seqlen_k": self.seqlen_k}
        spare = r.choice((0, 0, 2))
        self.first_q, self.first_k = (sum(lengths_q) + spare,), (sum(lengths_k) + spare,)
        self.finish_rows()

    def finish_rows(self):
        self.q = self.rows(self.first_q, self.heads, self.head_dim)
        self.k = self.rows(self.first_k, self.heads_k, self.head_dim)
        self.v = self.rows(self.first_k, self.heads_k, self.head_dim_v)
        self.dout = self.rows(self.first_q, self.heads, self.head_dim_v) if self.rng.random() < 0.8 else None

    def broadcast_shape(self):
        full = (self.batch, self.heads, self.seqlen_q, self.seqlen_k)
        return tuple(n if self.rng.random() < 0.6 else 1 for n in full)

    def choose_scores(self):
        r, options = self.rng, self.options
        if r.random() < 0.25:
            options["softcap"] = r.choice((0.5, 3.0, 30.0))
        if r.random() < 0.25:
            shape = (self.heads,) if r.random() < 0.5 else (self.batch, self.heads)
            options["alibi_slopes"] = self.normal(*shape).abs() / 8
        if r.random() < 0.35:
            bias = self.normal(*self.broadcast_shape()).to(r.choice((self.dtype, torch.float32)))
            if r.random() < 0.3:
                hidden = torch.rand(bias.shape, generator=self.generator).to(self.device) < 0.2
                bias = bias.masked_fill(hidden, -float("inf"))
            options["bias"] = bias
        if r.random() < 0.25:
            options["sink"] = self.normal(self.heads).to(r.choice((self.dtype, torch.float32)))

    def choose_visibility(self):
        r, options = self.rng, self.options
        if r.random() < 0.25:
            visible = torch.rand(self.broadcast_shape(), generator=self.generator) < 0.7
            options["mask"] = visible.to(self.device)
        if r.random() < 0.4:
            options["causal"] = True
        if r.random() < 0.3:
            options["window"] = tuple(r.choice((-1, 0, 1, 5, 40)) for _ in range(2))
        if r.random() < 0.25:
            offsets = [r.randint(-self.seqlen_q - 2, self.seqlen_k + 2) for _ in range(self.batch)]
            options["query_offset"] = int32(offsets, self.device)

    def __str__(self):
        def short(x):
            if not isinstance(x, torch.Tensor):
                return repr(x)
            if x.numel() <= 8 and not x.is_floating_point():
                return str(x.tolist())
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} stride {list(x.stride())}"

        tensors = {"q": self.q, "k": self.k, "v": self.v, "dout": self.dout}
        return ", ".join(f"{name}={short(x)}" for name, x in (tensors | self.options).items())


def seeds(count, part=0, parts=1):
    """The seeds to run: every ``parts``-th from ``part`` to count - 1, or the one in HF_FLASH_FUZZ_SEED.

    HF_FLASH_FUZZ_COUNT changes the count.
    """
    if one := os.environ.get("HF_FLASH_FUZZ_SEED"):
        return [int(one)] if int(one) % parts == part else []
    return range(part, int(os.environ.get("HF_FLASH_FUZZ_COUNT", count)), parts)


def fuzz(count, device, dtype, part=0, parts=1, **limits):
    """Judge ``count`` random calls, or a part of them; a failure says what the call was and how to repeat it alone."""
    chosen = seeds(count, part, parts)
    if not chosen:
        pytest.skip("none of the calls asked for is in this part")
    for seed in chosen:
        call = Draw(seed, device, dtype, **limits)
        try:
            check(call.q, call.k, call.v, dout=call.dout, small=True, **call.options)
        except Exception as error:
            test = os.environ.get("PYTEST_CURRENT_TEST", "tests/ops/test_fuzz.py (call)").rsplit(" ", 1)[0]
            raise AssertionError(
                f"{error}\nthe call: {call}\nto repeat it: "
                f"HF_FLASH_FUZZ_SEED={seed} {os.path.basename(sys.executable)} -m pytest '{test}'"
            ) from error
