"""``FlashAttention`` and ``FlashMHA``: the modules of FlashAttention's alpha release, on today's operator.

Their interface is that of ``flash_attn/flash_attention.py`` up to FlashAttention 0.2
(https://github.com/Dao-AILab/flash-attention). A model built from them keeps its state_dict: the parameters are
``Wqkv`` and ``out_proj``.
"""

from __future__ import annotations

import torch
from torch import nn

from .attention import flash_attention, longest
from .packing import key_ranges
from .support import is_integer

__all__ = ["FlashAttention", "FlashMHA"]


class FlashAttention(nn.Module):
    """Softmax attention of one stacked tensor of queries, keys and values; no parameters.

    Args:
        softmax_scale: factor of ``q @ k``; default ``1 / sqrt(head_dim)``. The first alpha called it ``softmax_temp``.
        attention_dropout: probability of dropping a softmax weight while training.
    """

    def __init__(self, softmax_scale=None, attention_dropout=0.0, device=None, dtype=None, *, softmax_temp=None):
        super().__init__()
        if softmax_scale is not None and softmax_temp is not None:
            raise ValueError(
                f"hf_flash [ARGUMENT]: `softmax_scale` is {softmax_scale} and `softmax_temp` {softmax_temp}; they are "
                "two names of one argument, pass one"
            )
        self.softmax_scale = softmax_temp if softmax_scale is None else softmax_scale
        self.dropout_p = attention_dropout

    def forward(
        self,
        qkv,
        key_padding_mask=None,
        causal=False,
        cu_seqlens=None,
        max_s=None,
        need_weights=False,
        *,
        attn_mask=None,
    ):
        """Attend.

        Args:
            qkv: ``(B, S, 3, H, D)``, or packed ``(T, 3, H, D)`` with ``cu_seqlens``.
            key_padding_mask: bool ``(B, S)``, True where a token counts, False for padding. Padding is seen by nobody,
                and its own rows of the result are 0.
            causal: a token sees itself and those before it.
            cu_seqlens: int32 ``(B + 1,)``, where each packed sequence starts, and T.
            max_s: the longest packed sequence; None reads it from the device.
            need_weights: True raises: the weights are never all in memory.
            attn_mask: bool, broadcasts to ``(B, H, S, S)``, True where a key is visible.

        Returns:
            ``(out, None)``, out ``(B, S, H, D)`` or ``(T, H, D)``.

        Raises:
            TypeError, ValueError, NotImplementedError: the sentence names the argument and what is allowed.
        """
        _refuse_weights(need_weights)
        packed = cu_seqlens is not None
        if not isinstance(qkv, torch.Tensor):
            raise TypeError(f"hf_flash [ARGUMENT]: `qkv` is a {type(qkv).__name__}; it must be a torch.Tensor")
        if qkv.dim() != (4 if packed else 5) or qkv.shape[-3] != 3:
            layout = (
                "(T, 3, H, D) as cu_seqlens is given" if packed else "(B, S, 3, H, D), or (T, 3, H, D) with cu_seqlens"
            )
            raise ValueError(f"hf_flash [ARGUMENT]: `qkv` has shape {tuple(qkv.shape)}; it must be {layout}")
        if packed and key_padding_mask is not None:
            raise ValueError(
                "hf_flash [ARGUMENT]: `key_padding_mask` does not go with `cu_seqlens`: a packed batch has no padding"
            )
        if max_s is not None and not packed:
            raise ValueError(f"hf_flash [ARGUMENT]: `max_s` is {max_s} without `cu_seqlens`; leave it out")
        if attn_mask is not None and getattr(attn_mask, "dtype", None) != torch.bool:
            what = getattr(attn_mask, "dtype", type(attn_mask).__name__)
            raise TypeError(f"hf_flash [ARGUMENT]: `attn_mask` is {what}; it must be a bool tensor, True = visible")
        options = {"scale": self.softmax_scale, "causal": causal, "mask": attn_mask}
        options["dropout_p"] = self.dropout_p if self.training else 0.0
        if packed:
            max_s = longest(cu_seqlens) if max_s is None and attn_mask is not None else max_s  # of the mask's shape
            options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            options |= {"max_seqlen_q": max_s, "max_seqlen_k": max_s}
        elif key_padding_mask is not None:
            return _attend_with_padding(qkv, key_padding_mask, options), None
        return flash_attention(*qkv.unbind(-3), **options), None


class FlashMHA(nn.Module):
    """Multi-head self-attention: projection to q, k, v, attention, output projection.

    Args:
        embed_dim: width of the input, a multiple of ``num_heads``; the head dimension is a multiple of 8 up to 256.
        num_heads: attention heads.
        bias: whether both projections have one.
        batch_first: must be True: the input is ``(B, S, embed_dim)``.
        attention_dropout: probability of dropping a softmax weight while training.
        causal: a token sees itself and those before it.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        bias=True,
        batch_first=True,
        attention_dropout=0.0,
        causal=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not batch_first:
            raise ValueError(
                "hf_flash [ARGUMENT]: `batch_first` is False; the input must be (B, S, embed_dim): transpose it"
            )
        if not is_integer(num_heads) or num_heads < 1:
            raise ValueError(f"hf_flash [ARGUMENT]: `num_heads` is {num_heads!r}; it must be a positive integer")
        if embed_dim % num_heads or embed_dim // num_heads % 8 or not 0 < embed_dim // num_heads <= 256:
            raise ValueError(
                f"hf_flash [HEAD_DIM]: `embed_dim` {embed_dim} over `num_heads` {num_heads} gives head_dim "
                f"{embed_dim / num_heads:g}; it must be a multiple of 8 from 8 to 256: choose another number of heads"
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.causal = causal
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.inner_attn = FlashAttention(attention_dropout=attention_dropout)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x, key_padding_mask=None, need_weights=False):
        """x ``(B, S, embed_dim)`` to ``(out, None)``, out like x; ``key_padding_mask`` bool ``(B, S)``, True = keep."""
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        context, weights = self.inner_attn(qkv, key_padding_mask, causal=self.causal, need_weights=need_weights)
        return self.out_proj(context.flatten(-2)), weights


def _refuse_weights(need_weights):
    if need_weights:
        raise NotImplementedError(
            "hf_flash [NEED_WEIGHTS]: `need_weights` is True, but the attention weights are never all in memory; pass "
            "need_weights=False, or compute them with torch.softmax where they are looked at"
        )


def _attend_with_padding(qkv, keep, options):
    """Padding at the ends of the rows becomes ranges; holes, and what may have some, need a mask as well."""
    if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool:
        what = keep.dtype if isinstance(keep, torch.Tensor) else f"a {type(keep).__name__}"
        raise TypeError(f"hf_flash [ARGUMENT]: `key_padding_mask` is {what}; it must be a bool tensor, True = keep")
    if keep.shape != qkv.shape[:2]:
        raise ValueError(
            f"hf_flash [ARGUMENT]: `key_padding_mask` has shape {tuple(keep.shape)}; it must be (B, S) = "
            f"{tuple(qkv.shape[:2])}"
        )
    key_range, holes = key_ranges(keep, waits=options["mask"] is not None)  # the two together would be quadratic
    options |= {"key_range": key_range, "query_range": key_range}
    if holes is not None:
        options["mask"] = holes if options["mask"] is None else options["mask"] & holes
    out = flash_attention(*qkv.unbind(-3), **options)
    return out if holes is None else out.masked_fill(~keep[..., None, None], 0)
