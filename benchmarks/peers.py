"""The attention implementations that the benchmark compares, each behind one call on (B, S, H, D) tensors."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class Case:
    """One cell: shapes, what is in the score, and the tensors once :meth:`build` made them."""

    section: str
    B: int
    S: int
    H: int
    D: int
    dtype: torch.dtype
    causal: bool = False
    dropout: float = 0.0
    padding: bool = False  # lengths from S/2 to S
    bias: bool = False  # (1, H, S, S) with gradient
    graph: bool = False  # timed inside a CUDA graph, so that host time does not count
    inputs: tuple = field(default=(), repr=False)

    @property
    def variant(self) -> str:
        names = ("causal", "dropout", "padding", "bias", "graph")
        return "+".join(name for name in names if getattr(self, name)) or "plain"

    @property
    def flops(self) -> float:
        """Of the forward, by the field's count: 4 B H S S D, half of it when causal; padding counted as dense."""
        return 4 * self.B * self.H * self.S**2 * self.D / (2 if self.causal else 1)

    def build(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (self.B, self.S, self.H, self.D)
        draw = lambda *size: torch.randn(*size, device="cuda", dtype=self.dtype, generator=generator)  # noqa: E731
        self.q, self.k, self.v = (draw(*shape).requires_grad_() for _ in range(3))
        self.dout = draw(*shape)
        self.inputs = (self.q, self.k, self.v)
        self.lengths = torch.linspace(self.S // 2, self.S, self.B, device="cuda").to(torch.int32)
        self.key_range = torch.stack((torch.zeros_like(self.lengths), self.lengths), 1).contiguous()
        if self.bias:
            self.bias_values = draw(1, self.H, self.S, self.S).requires_grad_()
            self.inputs += (self.bias_values,)

    def drop(self) -> None:
        for name in ("q", "k", "v", "dout", "inputs", "lengths", "key_range", "bias_values"):
            self.__dict__.pop(name, None)

    @property
    def visible(self) -> torch.Tensor:
        """(B, 1, S, S) bool, the mask that Transformers hands to scaled_dot_product_attention."""
        columns = torch.arange(self.S, device="cuda") < self.lengths[:, None]
        return columns[:, None, None, :].expand(self.B, 1, self.S, self.S)


@dataclass
class Peer:
    """``prepare(case)`` returns the function to time, or None where the peer cannot compute the case."""

    name: str
    prepare: Callable[[Case], Callable[[], torch.Tensor] | None]


def _hf_flash(case: Case):
    import hf_flash

    keywords = {"causal": case.causal, "dropout_p": case.dropout}
    if case.padding:
        keywords["key_range"] = case.key_range
    if case.bias:
        keywords["bias"] = case.bias_values
    return lambda: hf_flash.flash_attention(case.q, case.k, case.v, **keywords)


def _sdpa(backend: SDPBackend, masks: bool, bias: bool):
    def prepare(case: Case):
        if (case.padding and not masks) or (case.bias and not bias):
            return None
        q, k, v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
        mask = case.visible if case.padding else (case.bias_values if case.bias else None)
        if case.bias and backend == SDPBackend.EFFICIENT_ATTENTION:
            mask = mask.expand(case.B, -1, -1, -1)

        def call():
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, mask, case.dropout, is_causal=case.causal)
            return out.transpose(1, 2)

        return call

    return prepare


def _standard(case: Case):
    """Attention as the textbook and the eager models write it."""
    if case.B * case.H * case.S**2 * 2 > 14e9:  # several matrices of this size are alive at once
        return None
    mask = None
    if case.padding:
        mask = ~case.visible
    if case.causal:
        mask = torch.ones(case.S, case.S, dtype=torch.bool, device="cuda").triu(1)

    def call():
        scores = torch.einsum("bihd,bjhd->bhij", case.q, case.k) / math.sqrt(case.D)
        if case.bias:
            scores = scores + case.bias_values
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        probabilities = F.dropout(torch.softmax(scores, -1), case.dropout)
        return torch.einsum("bhij,bjhd->bihd", probabilities, case.v)

    return call


def _flex(case: Case):
    """FlexAttention, compiled once a shape: only plain and causal cells of three lengths, for the compiler's time."""
    if case.dropout or case.padding or case.bias or case.graph or case.S not in (1024, 4096, 16384):
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if case.causal:
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.S, case.S, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
    return lambda: compiled(q, k, v, block_mask=block_mask).transpose(1, 2)


def _flash_attn(module: str):
    """flash-attn 3 or 4, whose ``flash_attn_func`` takes neither dropout nor masks nor a bias."""

    def prepare(case: Case):
        if case.dropout or case.padding or case.bias:
            return None
        function = importlib.import_module(module).flash_attn_func

        def call():
            out = function(case.q, case.k, case.v, causal=case.causal)
            return out[0] if isinstance(out, tuple) else out

        return call

    return prepare


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
        return True
    except Exception:  # a peer that cannot load is left out, whatever its reason
        return False


def all_peers(flex: bool = True) -> list[Peer]:
    """hf_flash first; flash-attn 3 and 4 only where they can be imported."""
    peers = [
        Peer("hf_flash", _hf_flash),
        Peer("flash (torch)", _sdpa(SDPBackend.FLASH_ATTENTION, masks=False, bias=False)),
        Peer("mem-efficient (torch)", _sdpa(SDPBackend.EFFICIENT_ATTENTION, masks=True, bias=True)),
        Peer("cuDNN (torch)", _sdpa(SDPBackend.CUDNN_ATTENTION, masks=True, bias=True)),
        Peer("standard", _standard),
    ]
    if flex:
        peers.append(Peer("FlexAttention", _flex))
    for name, module in (("flash-attn 3", "flash_attn_interface"), ("flash-attn 4", "flash_attn.cute")):
        if _importable(module):
            peers.append(Peer(name, _flash_attn(module)))
    return peers
