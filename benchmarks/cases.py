"""The cells that the benchmark measures: shapes, what is in the score, and the tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product

import torch

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# 16384 tokens of a packed batch, from one short text to one long document; most lengths divide by nothing.
RAGGED = (4096, 277, 3001, 523, 2111, 1013, 1531, 769, 631, 384, 2048)
SECTIONS = ("peers", "short", "d256", "grouped", "dropout", "padding", "packed", "bias", "extras", "arch", "standard")
GROUPED = {f"{n} heads share": n for n in (4, 7, 8)}  # heads of q for one of k


@dataclass
class Case:
    """One cell: shapes, what is in the score, and the tensors once :meth:`build` made them.

    terms, any of: "padding" (lengths from S/2 to S), "packed" (one row of RAGGED sequences), "bias" ((1, H, S, S) with
    gradient), "fixed bias" (without), "alibi", "deterministic" (backward), "4 heads share" (one of k) and others of
    GROUPED, "graph" (timed inside a CUDA graph, so that host time does not count).
    """

    section: str
    B: int
    S: int
    H: int
    D: int
    dtype: torch.dtype
    causal: bool = False
    dropout: float = 0.0
    terms: tuple[str, ...] = ()
    inputs: tuple = field(default=(), repr=False)

    @property
    def uses(self) -> tuple[str, ...]:
        """Everything in this cell that a peer may lack."""
        return ("causal",) * self.causal + ("dropout",) * (self.dropout > 0) + self.terms

    @property
    def heads_k(self) -> int:
        return self.H // max([GROUPED.get(term, 1) for term in self.terms], default=1)

    @property
    def variant(self) -> str:
        return "+".join(self.uses) or "plain"

    @property
    def flops(self) -> float:
        """Of the forward, by the field's count: 4 B H S S D, half of it when causal; padding counted as dense."""
        squares = sum(n * n for n in RAGGED) if "packed" in self.terms else self.B * self.S**2
        return 4 * self.H * self.D * squares / (2 if self.causal else 1)

    def build(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        rows = (sum(RAGGED),) if "packed" in self.terms else (self.B, self.S)

        def draw(*size):
            return torch.randn(*size, device="cuda", dtype=self.dtype, generator=generator)

        heads = (self.H, self.heads_k, self.heads_k)
        self.q, self.k, self.v = (draw(*rows, h, self.D).requires_grad_() for h in heads)
        self.dout = draw(*rows, self.H, self.D)
        self.inputs = (self.q, self.k, self.v)
        if "padding" in self.terms:
            self.lengths = torch.linspace(self.S // 2, self.S, self.B, device="cuda").to(torch.int32)
            self.key_range = torch.stack((torch.zeros_like(self.lengths), self.lengths), 1).contiguous()
        if "packed" in self.terms:
            ends = [sum(RAGGED[:n]) for n in range(len(RAGGED) + 1)]
            self.cu_seqlens = torch.tensor(ends, dtype=torch.int32, device="cuda")
        if "alibi" in self.terms:  # the slopes of the paper (Press et al. 2022) for H a power of two
            self.slopes = 2.0 ** (-8.0 * torch.arange(1, self.H + 1, device="cuda", dtype=torch.float32) / self.H)
        if "bias" in self.terms or "fixed bias" in self.terms:
            self.bias = draw(1, self.H, self.S, self.S)
        if "bias" in self.terms:
            self.inputs += (self.bias.requires_grad_(),)

    def plain(self) -> Case:
        """The cell without dropout and terms that this one's rate is held against, on the same rows of q, k and v."""
        plain = replace(self, dropout=0.0, terms=tuple(term for term in self.terms if term == "graph"))
        if "packed" in self.terms:
            plain.B, plain.S = 8, sum(RAGGED) // 8
        rows = (plain.B, plain.S, self.H, self.D)
        plain.q, plain.k, plain.v = (t.detach().view(rows).requires_grad_() for t in (self.q, self.k, self.v))
        plain.dout = self.dout.view(rows)
        plain.inputs = (plain.q, plain.k, plain.v)
        return plain

    def drop(self) -> None:
        for name in ("q", "k", "v", "dout", "inputs", "lengths", "key_range", "cu_seqlens", "slopes", "bias"):
            self.__dict__.pop(name, None)

    @property
    def visible(self) -> torch.Tensor:
        """(B, 1, S, S) bool, the mask that Transformers hands to scaled_dot_product_attention."""
        columns = torch.arange(self.S, device="cuda") < self.lengths[:, None]
        return columns[:, None, None, :].expand(self.B, 1, self.S, self.S)


def grid(section: str, lengths, head_dims=(64, 128), terms=()) -> list[Case]:
    """16k tokens of hidden size 2048 in bfloat16, causal and not: the field's own comparison."""
    return [
        Case(section, 16384 // s, s, 2048 // d, d, torch.bfloat16, causal=causal, terms=terms)
        for d, causal, s in product(head_dims, (False, True), lengths)
    ]


def grouped(section: str) -> list[Case]:
    """Four or eight heads of q share one of k; then batches of few heads of k: Qwen 2.5 7B and 0.5B, Gemma 2B."""
    cells = [(128, n, s) for n in (4, 8) for s in (2048, 8192)] + [(64, 4, 2048)]
    shapes = [(16384 // s, s, 2048 // d, d, n, causal) for d, n, s in cells for causal in (False, True)]
    shapes += [(1, 4096, 28, 128, 7, True), (2, 4096, 14, 64, 7, True), (2, 4096, 8, 256, 8, True)]
    return [
        Case(section, b, s, h, d, torch.bfloat16, causal, terms=(f"{n} heads share",))
        for b, s, h, d, n, causal in shapes
    ]


def bert(section: str, lengths, dropout=0.1, terms=(), causal=False) -> list[Case]:
    """What BERT and GPT-2 train with: float16, batch 8, 12 heads of 64."""
    return [Case(section, 8, s, 12, 64, torch.float16, causal, dropout, terms) for s in lengths]


def packed(section: str) -> list[Case]:
    """A ragged packed batch; its FLOP rate is held against the plain cell of S 2048."""
    return [
        Case(section, len(RAGGED), max(RAGGED), 2048 // d, d, torch.bfloat16, causal, terms=("packed",))
        for d, causal in product((64, 128), (False, True))
    ]


def extras(section: str) -> list[Case]:
    """Each term of the score, one at a time; its rate is held against the plain cell."""
    cells = []
    for d in (64, 128):
        shape = (section, 8, 2048, 2048 // d, d, torch.bfloat16)
        cells.append(Case(*shape, dropout=0.1))
        cells += [Case(*shape, terms=(term,)) for term in ("fixed bias", "bias", "alibi", "deterministic")]
    return cells


def cases_of(section: str) -> list[Case]:
    """The cells of a section."""
    if section == "peers":
        return grid(section, LENGTHS)
    if section == "short":
        return grid(section, (128, 256, 384, 512, 1024), terms=("graph",))
    if section == "d256":
        return grid(section, LENGTHS[2:], head_dims=(256,))
    if section == "grouped":
        return grouped(section)
    if section == "dropout":
        return bert(section, LENGTHS[:2], terms=("graph",)) + bert(section, LENGTHS)
    if section == "padding":
        return bert(section, LENGTHS[:2], terms=("padding", "graph")) + bert(section, LENGTHS, terms=("padding",))
    if section == "packed":
        return packed(section)
    if section == "bias":
        cells = bert(section, LENGTHS[:2], dropout=0.0, terms=("bias", "graph"))
        cells += bert(section, LENGTHS[:4], dropout=0.0, terms=("bias",))
        return cells + bert(section, LENGTHS[:3], terms=("bias",))  # what T5 trains with
    if section == "extras":
        return extras(section)
    if section == "arch":
        cells = grid(section, LENGTHS) + bert(section, LENGTHS[1:5])
        return cells + bert(section, LENGTHS[1:5], terms=("padding",)) + bert(section, LENGTHS[:4], 0.0, ("bias",))
    if section == "standard":
        lengths = (128, 256, *LENGTHS, 32768, 65536)
        cells = bert(section, lengths, dropout=0.0) + bert(section, lengths, dropout=0.0, causal=True)
        return cells + bert(section, lengths) + bert(section, lengths, terms=("padding",))
    raise ValueError(f"unknown section {section!r}; sections are {', '.join(SECTIONS)} and host")
