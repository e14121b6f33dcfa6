"""The attention implementations that the benchmark compares, each behind one call on the tensors of a case."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from cases import GROUPED, RAGGED, Case
from torch.nn.attention import SDPBackend, sdpa_kernel

# What a peer cannot compute, by the term of a case, in the words that the report prints.
NO_DROPOUT = {"dropout": "has no dropout"}
NO_MASK = {"padding": "takes no mask"}
NO_BIAS = {"bias": "takes no bias", "fixed bias": "takes no bias", "alibi": "has no ALiBi"}
NOT_PACKED = {"packed": "takes no packed batch"}
NOT_SHARED = dict.fromkeys(GROUPED, "takes as many heads of k as of q")
PACKAGES = {"flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}  # peer -> module
NO_CHOICE = {"deterministic": "has no deterministic mode to choose"}


@dataclass
class Peer:
    """``prepare(case)`` returns the function to time.

    Every tensor of the autograd graph must be made inside that function: what is made before has the stream of then,
    and a CUDA graph that meets another stream in its backward cannot be captured. lacks: term of a case -> why this
    peer cannot compute it. sections: where alone it runs; empty for everywhere. environment: set around each call.
    plain: it runs the plain cell of a case's shape, in turns with the others, so that both meet the same clock.
    """

    name: str
    prepare: Callable[[Case], Callable[[], torch.Tensor]]
    lacks: dict[str, str] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    plain: bool = False

    def cannot(self, case: Case) -> str | None:
        """Why this peer is left out of a case that its section has it in, or None."""
        return next((self.lacks[term] for term in case.uses if term in self.lacks), None)


def _hf_flash(case: Case):
    import hf_flash

    keywords = {"causal": case.causal, "dropout_p": case.dropout, "deterministic": "deterministic" in case.terms}
    if "padding" in case.terms:
        keywords["key_range"] = case.key_range
    if "packed" in case.terms:
        keywords |= {"cu_seqlens_q": case.cu_seqlens, "cu_seqlens_k": case.cu_seqlens}
        keywords |= {"max_seqlen_q": max(RAGGED), "max_seqlen_k": max(RAGGED)}
    if "alibi" in case.terms:
        keywords["alibi_slopes"] = case.slopes
    if "bias" in case.terms or "fixed bias" in case.terms:
        keywords["bias"] = case.bias
    return lambda: hf_flash.flash_attention(case.q, case.k, case.v, **keywords)


def _sdpa(backend: SDPBackend | None):
    """scaled_dot_product_attention through one backend; None: as PyTorch dispatches it."""

    def prepare(case: Case):
        mask = case.visible if "padding" in case.terms else None

        def attend():
            q, k, v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
            bias = mask
            if "bias" in case.terms or "fixed bias" in case.terms:
                bias = case.bias.expand(case.B, -1, -1, -1)  # a view; mem-efficient takes no size 1 for B
            shared = case.heads_k < case.H
            out = F.scaled_dot_product_attention(q, k, v, bias, case.dropout, is_causal=case.causal, enable_gqa=shared)
            return out.transpose(1, 2)

        def call():
            with sdpa_kernel(backend):
                return attend()

        return call if backend is not None else attend

    return prepare


def _torch_flash(case: Case):
    """PyTorch's flash backend; a packed batch through torch.nn.attention.varlen."""
    if "packed" not in case.terms:
        return _sdpa(SDPBackend.FLASH_ATTENTION)(case)
    from torch.nn.attention.varlen import varlen_attn

    window = "window_size" in inspect.signature(varlen_attn).parameters  # newer releases; is_causal before
    causal = {"window_size": (-1, 0 if case.causal else -1)} if window else {"is_causal": case.causal}
    starts, longest = case.cu_seqlens, max(RAGGED)
    return lambda: varlen_attn(case.q, case.k, case.v, starts, starts, longest, longest, **causal)


def _standard(case: Case):
    """Attention as the textbook and the eager models write it."""
    if case.B * case.H * case.S**2 * 2 > 14e9:  # several matrices of this size are alive at once
        raise NotImplementedError("would hold several matrices of B H S S elements, more than 14 GB each")
    mask = None
    if "padding" in case.terms:
        mask = ~case.visible
    if case.causal:
        mask = torch.ones(case.S, case.S, dtype=torch.bool, device="cuda").triu(1)

    def call():
        scores = torch.einsum("bihd,bjhd->bhij", case.q, case.k) / math.sqrt(case.D)
        if "bias" in case.terms or "fixed bias" in case.terms:
            scores = scores + case.bias
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        probabilities = F.dropout(torch.softmax(scores, -1), case.dropout)
        return torch.einsum("bhij,bjhd->bihd", probabilities, case.v)

    return call


def _flex(case: Case):
    """FlexAttention, compiled for one shape after the other: the limit of recompiles would leave it uncompiled."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward is timed over a kept graph
    block_mask = None
    if case.causal:
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.S, case.S, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call():
        q, k, v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
        return compiled(q, k, v, block_mask=block_mask).transpose(1, 2)

    return call


def _flash_attn(module: str):
    """flash-attn 3 or 4; both return out, or (out, lse) by release."""

    def prepare(case: Case):
        library = importlib.import_module(module)
        keywords = {"causal": case.causal}
        function = library.flash_attn_func
        if "deterministic" in case.terms:
            keywords["deterministic"] = True
        if "packed" in case.terms:
            function = library.flash_attn_varlen_func
            keywords |= {"cu_seqlens_q": case.cu_seqlens, "cu_seqlens_k": case.cu_seqlens}
            keywords |= {"max_seqlen_q": max(RAGGED), "max_seqlen_k": max(RAGGED)}

        def call():
            out = function(case.q, case.k, case.v, **keywords)
            return out[0] if isinstance(out, tuple) else out

        return call

    return prepare


def _importable(module: str) -> str | None:
    """None, or why a module cannot be imported: a peer that cannot load is left out, whatever its reason."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def all_peers(flex: bool = True) -> tuple[list[Peer], dict[str, str]]:
    """(peers, hf_flash first; name of a peer -> why it is not among them)."""
    lacks_extras = NO_DROPOUT | NO_MASK | NO_BIAS
    cudnn_lacks = NOT_PACKED | NO_CHOICE | {"bias": "has no gradient of a bias", "alibi": "has no ALiBi"}
    peers = [
        Peer("hf_flash", _hf_flash),
        Peer("hf_flash plain", _hf_flash, sections=("packed", "bias", "extras"), plain=True),
        Peer("hf_flash sm80", _hf_flash, sections=("arch",), environment={"HF_FLASH_ARCH": "sm80"}),
        Peer("flash (torch)", _torch_flash, NO_MASK | NO_BIAS | NO_CHOICE),
        Peer(
            "mem-efficient (torch)",
            _sdpa(SDPBackend.EFFICIENT_ATTENTION),
            NOT_PACKED | NOT_SHARED | NO_CHOICE | {"alibi": "has no ALiBi"},
        ),
        Peer("cuDNN (torch)", _sdpa(SDPBackend.CUDNN_ATTENTION), cudnn_lacks),
        Peer("sdpa (dispatch)", _sdpa(None), sections=("padding",)),
        Peer("standard", _standard, NOT_PACKED | NOT_SHARED | NO_CHOICE | {"alibi": "has no ALiBi"}),
    ]
    missing = {}
    if flex:
        peers.append(Peer("FlexAttention", _flex, sections=("peers",)))
    for name, module in PACKAGES.items():
        reason = _importable(module)
        if reason is None:
            peers.append(Peer(name, _flash_attn(module), lacks_extras))
        else:
            missing[name] = reason
    return peers, missing


def peers_of(case: Case, peers: list[Peer]) -> list[Peer]:
    """The peers that stand in a case's section; whether each can compute the case is its own matter."""
    here = [peer for peer in peers if not peer.sections or case.section in peer.sections]
    if case.section == "standard":  # the yardstick of its own section: hf_flash alone stands beside it
        return [peer for peer in here if peer.name in ("hf_flash", "standard")]
    if case.section == "extras":
        names = ("hf_flash", "hf_flash plain", "mem-efficient (torch)", "flash-attn 3", "flash-attn 4")
        return [peer for peer in here if peer.name in names]
    if case.section == "arch":  # the yardstick of the mma.sync kernels is what they stand beside on other GPUs
        names = {"hf_flash", "hf_flash sm80", "flash (torch)"}
        if {"padding", "bias"} & set(case.terms):
            names |= {"mem-efficient (torch)", "cuDNN (torch)"}
        return [peer for peer in here if peer.name in names]
    here = [peer for peer in here if peer.name != "FlexAttention" or case.S == 4096]  # for the compiler's time
    heavy = case.section not in ("dropout", "padding", "bias") or case.S > 2048
    return [peer for peer in here if peer.name != "standard" or not heavy]
