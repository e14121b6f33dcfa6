"""``flash_attention``: exact attention in linear memory, with everything that the models put into the score.

The algorithm is FlashAttention's (Dao et al., https://arxiv.org/abs/2205.14135); ``hf_flash/reference.py`` states in
plain PyTorch what it computes.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import warnings

import torch

from . import ops, support
from .packing import is_traced

__all__ = [
    "dropout_keep",
    "flash_attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

# HF_FLASH_CHECK=1: read cu_seqlens and ranges back from the device before each call and raise on bad values; not where
# a call is traced, which has none.
CHECK_VALUES = os.environ.get("HF_FLASH_CHECK", "0") == "1"

MAX_ROWS = 2**28  # of a sequence, as csrc/attention/sequence.h has it


def dropout_keep(dropout_p: float) -> int:
    """Of 256 probabilities how many are kept at rate ``dropout_p``; kept values are scaled by 256 over this number.

    >>> dropout_keep(0.1)
    230
    """
    keep = min(256, max(1, math.floor(256 * (1 - dropout_p) + 0.5)))
    if keep == 256 and dropout_p > 0 and not torch.compiler.is_compiling():
        warnings.warn(
            f"hf_flash: dropout_p={dropout_p} rounds to no dropout; the rate is kept in steps of 1/256, so the "
            "smallest one is 0.00196",
            stacklevel=4,
        )
    return keep


def draw_seed(device: torch.device) -> tuple[torch.Tensor | None, int]:
    """A seed from torch's generator for ``device``: as an int64 tensor ``(1,)`` there, or None and its value.

    The generators of GPUs count on the host, where a seed takes one microsecond and a kernel that draws it takes ten.
    Each seed moves the generator's offset on, which checkpointing restores; under CUDA graphs, which have to draw anew
    at every replay, and where a call is traced a kernel draws.
    """
    if device.type != "cuda" or is_traced() or torch.cuda.is_current_stream_capturing():
        return seed_on(device), 0
    generator = torch.cuda.default_generators[device.index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # the step in which torch's own kernels move it
    return None, (_scrambled(generator.initial_seed()) + offset // 4 + 2**63) % 2**64 - 2**63


def seed_on(device: torch.device) -> torch.Tensor:
    """A seed, int64 ``(1,)``, that torch's generator for the device draws there."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, dtype=torch.int64)


@functools.lru_cache(maxsize=8)
def _scrambled(seed: int) -> int:
    """64 bits without a pattern, so that neighbouring seeds lead to different streams (splitmix64, Steele et al.,
    https://doi.org/10.1145/2660193.2660195)."""
    x = (seed + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    key_range: torch.Tensor | None = None,
    query_range: torch.Tensor | None = None,
    query_offset: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax attention without the S x S matrix; differentiable once in q, k, v, bias and sink.

    Args:
        q: ``(B, Sq, Hq, D)``, or packed ``(T, Hq, D)`` with ``cu_seqlens``. D is a multiple of 8 up to 256.
        k: ``(B, Sk, Hk, D)`` or ``(T, Hk, D)``; Hq is a multiple of Hk (grouped-query attention).
        v: ``(B, Sk, Hk, Dv)`` or ``(T, Hk, Dv)``. A last dimension that is not contiguous is copied.
        scale: factor of ``q @ k``; default ``1 / sqrt(D)``.
        causal: same as ``window_right = 0``.
        window: ``(left, right)``: query i sees key j when ``-left <= j - position(i) <= right``; -1 is unlimited.
        softcap: ``c > 0`` replaces a score s by ``c * tanh(s / c)``.
        bias: added to the scores; float32 or q's dtype, broadcasts to ``(B, Hq, Sq, Sk)``; -inf hides a key.
        mask: bool, broadcasts to ``(B, Hq, Sq, Sk)``, True where a key is visible. One of keys alone, ``(B, 1,
            1, Sk)``, costs a GPU little where it has no holes: in a padded batch the kernels find the range of
            what it shows, unless ``key_range`` is given.
        alibi_slopes: float32 ``(Hq,)`` or ``(B, Hq)``; adds ``-slope * |position(i) - j|`` (Press et al.,
            https://arxiv.org/abs/2108.12409). No gradient.
        sink: ``(Hq,)``, float32 or q's dtype: one more logit in each row's softmax, without a value.
        dropout_p: probability of dropping a softmax weight, 0 <= p < 1, in steps of 1/256.
        dropout_seed: int64 ``(1,)`` on q's device; default: drawn from torch's generator for that device.
        key_range: int32 ``(B, 2)``: keys of batch entry b outside ``[begin, end)`` are never used.
        query_range: int32 ``(B, 2)``: rows outside are not computed: out 0, lse -inf, gradients 0.
        query_offset: int32 ``(B,)``: ``position(i) = i + query_offset[b]``; default Sk - Sq (bottom-right).
        cu_seqlens_q, cu_seqlens_k: int32 ``(B + 1,)``, where each packed sequence starts, and T.
        max_seqlen_q, max_seqlen_k: the longest packed sequence; None reads it from the device, which synchronises. Of a
            longer sequence the rows and keys beyond are left out in silence; with HF_FLASH_CHECK=1 that raises. Where
            a call is traced (torch.compile, torch.export, torch.jit.trace) None stands for all rows.
        deterministic: gradients with the same bits on every run; None follows
            ``torch.are_deterministic_algorithms_enabled()``.
        return_lse: also return lse, ``(B, Hq, Sq)`` or packed ``(Hq, T)``: the natural logarithm of each row's sum of
            exponentials, float32 (float64 for float64 inputs); differentiable.

    Returns:
        out ``(B, Sq, Hq, Dv)`` or ``(T, Hq, Dv)`` in q's dtype, or ``(out, lse)``. A row that sees no key has out 0
        and lse -inf (or the sink).

    Raises:
        TypeError, ValueError: an argument is wrong; the sentence names it, its value and what is allowed.
        NotImplementedError: no kernel serves this dtype, head dimension or device.
    """
    arguments = (
        scale, causal, window, softcap, bias, mask, alibi_slopes, sink, dropout_p, dropout_seed, key_range, query_range,
        query_offset, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic,
    )  # fmt: skip
    reason = support.unsupported(q, k, v, *arguments) or support.unclear("return_lse", return_lse)
    if reason is not None:
        raise reason.exception()
    return judged_attention(q, k, v, *arguments, return_lse)


def judged_attention(
    q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, bias=None, mask=None, alibi_slopes=None,
    sink=None, dropout_p=0.0, dropout_seed=None, key_range=None, query_range=None, query_offset=None,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=None, return_lse=False,
    heads_first=False,
):  # fmt: skip
    """:func:`flash_attention` for those who have asked :func:`support.unsupported` already; arguments as there.

    heads_first: q, k and v are ``(B, H, S, D)``, as Transformers has them; not in a packed batch.
    """
    if cu_seqlens_q is not None:
        max_seqlen_q = longest(cu_seqlens_q) if max_seqlen_q is None else max_seqlen_q
        max_seqlen_k = longest(cu_seqlens_k) if max_seqlen_k is None else max_seqlen_k
    if CHECK_VALUES and not is_traced():
        rows = 2 if heads_first else 0 if cu_seqlens_q is not None else 1
        lengths = q.shape[rows], k.shape[rows]
        _check_values(lengths, key_range, query_range, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    keep, seed_value = dropout_keep(dropout_p) if dropout_p > 0 else 256, 0
    if keep == 256:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed, seed_value = draw_seed(q.device)
    numbers = (  # in the order of ops.Numbers, which would take another microsecond
        q.shape[-1] ** -0.5 if scale is None else scale,
        heads_first,
        window[0],
        0 if causal else window[1],
        keep,
        seed_value,
        softcap,
        torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
        max_seqlen_q or 0,
        max_seqlen_k or 0,
    )
    tensors = (_contiguous(key_range), _four_dimensions(mask))
    if not (
        query_range is query_offset is dropout_seed is alibi_slopes is None
        and cu_seqlens_q is cu_seqlens_k is bias is sink is None
    ):
        accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
        tensors = ops.Tensors(
            *tensors,
            query_range=_contiguous(query_range),
            query_offset=_contiguous(query_offset),
            dropout_seed=dropout_seed,
            alibi_slopes=_contiguous(alibi_slopes),
            cu_seqlens_q=_contiguous(cu_seqlens_q),
            cu_seqlens_k=_contiguous(cu_seqlens_k),
            bias=_four_dimensions(bias),
            sink=None if sink is None else sink.to(accumulator).contiguous(),
        )
    elif key_range is mask is None:
        tensors = ()
    out, lse = ops.attention(q, k, v, numbers, tensors, return_lse)
    return (out, lse) if return_lse else out


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _four_dimensions(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None or t.dim() == 4 else t[(None,) * (4 - t.dim())]


def longest(cu_seqlens: torch.Tensor) -> int:
    """Of packed sequences, read from the device."""
    if is_traced():  # what is read today need not hold tomorrow: the most that there can be, or all rows if fewer
        return MAX_ROWS
    return int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if cu_seqlens.numel() > 1 else 0


def _check_values(lengths, key_range, query_range, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    """What kernels clamp in silence raises here. Synchronises with the device. lengths: rows of q and of k."""
    rows_q, rows_k = lengths
    for name, t, length in (("key_range", key_range, rows_k), ("query_range", query_range, rows_q)):
        if t is None:
            continue
        for b, (begin, end) in enumerate(t.tolist()):
            if not 0 <= begin <= end <= length:
                raise ValueError(
                    f"hf_flash: `{name}`[{b}] is ({begin}, {end}); it must satisfy 0 <= begin <= end <= {length}"
                )
    for name, t, total, longest in (
        ("q", cu_seqlens_q, rows_q, max_seqlen_q),
        ("k", cu_seqlens_k, rows_k, max_seqlen_k),
    ):
        if t is None:
            continue
        bounds = t.tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > total:
            raise ValueError(
                f"hf_flash: `cu_seqlens_{name}` is {bounds}; it must start at 0, never decrease and not exceed {total}"
            )
        lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
        if max(lengths, default=0) > longest:
            raise ValueError(
                f"hf_flash: `max_seqlen_{name}` is {longest}; cu_seqlens_{name} has a sequence of {max(lengths)} rows"
            )


# At the end, since these functions call flash_attention above.
from .flash_attn_api import (  # noqa: E402
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
