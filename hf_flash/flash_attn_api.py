"""flash-attn 2.8's functions, with its names, signatures and meaning: code written for it runs by changing the import.

    from hf_flash import flash_attn_func  # instead of: from flash_attn import flash_attn_func

The interface is https://github.com/Dao-AILab/flash-attention, ``flash_attn/flash_attn_interface.py``. What differs:
float32 and float64 work on the CPU; the rate of dropout moves in steps of 1/256; ``softmax_lse`` is differentiable, and
-inf (not +inf) in a row that sees no key; ``S_dmask`` has the documented shape, without padding to tiles.
"""

from __future__ import annotations

import torch

from . import attention, reference, support

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention of q ``(B, Sq, Hq, D)`` over k and v ``(B, Sk, Hk, D)``, Hq a multiple of Hk.

    Args:
        dropout_p: probability of dropping a softmax weight; pass 0 in evaluation.
        softmax_scale: factor of ``q @ k``; default ``1 / sqrt(D)``.
        causal: query i sees keys up to i + Sk - Sq: the mask's corner is at the bottom right.
        window_size: (left, right), keys seen on each side of i + Sk - Sq; negative is unlimited.
        softcap: ``c > 0`` replaces a score s by ``c * tanh(s / c)``.
        alibi_slopes: float32 ``(Hq,)`` or ``(B, Hq)``; adds ``-slope * |i + Sk - Sq - j|``.
        deterministic: gradients with the same bits on every run.
        return_attn_probs: return ``(out, softmax_lse, S_dmask)``, for tests.

    Returns:
        out ``(B, Sq, Hq, D)``, or ``(out, softmax_lse, S_dmask)``. softmax_lse ``(B, Hq, Sq)`` is float32. S_dmask is
        None without dropout; otherwise the softmax's weights in q's dtype, ``(B, Hq, Sq, Sk)``, negative where dropout
        dropped them. PyTorch builds it from all scores at once: time and memory grow with Sq * Sk.
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _attend(q, k, v, options, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_func` of qkv ``(B, S, 3, H, D)``; the gradient comes back as one tensor."""
    q, k, v = _unbind(qkv, "qkv", 3)
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _attend(q, k, v, options, return_attn_probs)


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_func` of q ``(B, Sq, Hq, D)`` and kv ``(B, Sk, 2, Hk, D)``."""
    k, v = _unbind(kv, "kv", 2)
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _attend(q, k, v, options, return_attn_probs)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """:func:`flash_attn_func` of a packed batch: q ``(Tq, Hq, D)``, k and v ``(Tk, Hk, D)``.

    ``cu_seqlens_q`` and ``cu_seqlens_k`` are int32 ``(B + 1,)``: where each sequence starts, and the end of the last.
    ``softmax_lse`` is ``(Hq, Tq)`` and ``S_dmask`` ``(B, Hq, max_seqlen_q, max_seqlen_k)``. A ``block_table`` (paged
    keys and values, for inference) raises NotImplementedError.
    """
    if block_table is not None:
        raise NotImplementedError(
            f"hf_flash [BLOCK_TABLE]: `block_table` has shape {tuple(getattr(block_table, 'shape', ()))}; paged keys "
            "and values are not supported: gather the pages into k and v (T, H, D) and pass block_table=None"
        )
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    options |= _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attend(q, k, v, options, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_varlen_func` of qkv ``(T, 3, H, D)``."""
    q, k, v = _unbind(qkv, "qkv", 3)
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    options |= _lengths(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _attend(q, k, v, options, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """:func:`flash_attn_varlen_func` of q ``(Tq, Hq, D)`` and kv ``(Tk, 2, Hk, D)``."""
    k, v = _unbind(kv, "kv", 2)
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    options |= _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attend(q, k, v, options, return_attn_probs)


def _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic) -> dict:
    """flash-attn takes any negative window and softcap for none; all else is judged by flash_attention."""
    if isinstance(window_size, (tuple, list)):
        window_size = tuple(-1 if support.is_integer(side) and side < 0 else side for side in window_size)
    return {
        "dropout_p": dropout_p,
        "scale": softmax_scale,
        "causal": causal,
        "window": window_size,
        "softcap": 0.0 if support.is_number(softcap) and softcap < 0 else softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": None if deterministic is False else deterministic,  # None follows torch's own setting
    }


def _lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> dict:
    def number(longest, cu_seqlens):
        if longest is None and isinstance(cu_seqlens, torch.Tensor):
            return attention.longest(cu_seqlens)
        integer = isinstance(longest, torch.Tensor) and longest.numel() == 1 and not longest.is_floating_point()
        return int(longest) if integer else longest  # users of flash-attn take it from cu_seqlens

    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": number(max_seqlen_q, cu_seqlens_q),
        "max_seqlen_k": number(max_seqlen_k, cu_seqlens_k),
    }


def _unbind(packed, name, count):
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"hf_flash [ARGUMENT]: `{name}` is a {type(packed).__name__}; it must be a torch.Tensor")
    if packed.dim() < 3 or packed.shape[-3] != count:
        raise ValueError(
            f"hf_flash [ARGUMENT]: `{name}` has shape {tuple(packed.shape)}; it must be (..., {count}, H, D): "
            f"{' and '.join(name)} stacked before the heads"
        )
    return packed.unbind(-3)


def _attend(q, k, v, options, return_attn_probs):
    sound = all(isinstance(t, torch.Tensor) and t.dim() > 0 for t in (q, k, v))
    if not sound or q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise support.unsupported(q, k, v, **options).exception()  # padding would make 12 and 14 equal
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    if options["scale"] is None:
        options["scale"] = head_dim**-0.5
    q, k, v = _padded(q), _padded(k), _padded(v)
    reason = support.unclear("return_attn_probs", return_attn_probs) or support.unsupported(q, k, v, **options)
    if reason is not None:
        sentence = reason.sentence.replace("`window`", "`window_size`").replace("`scale`", "`softmax_scale`")
        raise reason._replace(sentence=sentence).exception()
    if not return_attn_probs:
        return attention.judged_attention(q, k, v, **options)[..., :head_dim_v]
    if options["dropout_p"] > 0:
        options["dropout_seed"] = attention.seed_on(q.device)
    out, lse = attention.judged_attention(q, k, v, **options, return_lse=True)
    weights = _signed_weights(q, k, v, options) if options["dropout_p"] > 0 else None
    return out[..., :head_dim_v], lse, weights


def _padded(t):
    """Zeros up to the next multiple of 8 in the last dimension, which change no score. What is too long stays."""
    head_dim = t.shape[-1]
    return torch.nn.functional.pad(t, (0, -head_dim % 8)) if head_dim % 8 and head_dim < support.MAX_HEAD_DIM else t


@torch.no_grad()
def _signed_weights(q, k, v, options):
    """The softmax's weights (B, Hq, Sq, Sk), negative where dropped: the derivative of lse by the scores."""
    options = {name: value for name, value in options.items() if name != "deterministic"}
    seed, keep = options.pop("dropout_seed"), reference.dropout_keep(options.pop("dropout_p"))
    if options.get("cu_seqlens_q") is not None:
        shape = options["cu_seqlens_q"].numel() - 1, q.shape[1], options["max_seqlen_q"], options["max_seqlen_k"]
    else:
        shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    with torch.enable_grad():
        added = torch.zeros(shape, device=q.device, requires_grad=True)
        _, lse = reference.reference_attention(
            q.detach(), k.detach(), v.detach(), bias=added, dtype=torch.promote_types(q.dtype, torch.float32), **options
        )
        (weights,) = torch.autograd.grad(lse.sum(), added)
    kept = torch.ops.hf_flash.dropout_mask(seed, *shape, keep)
    return torch.where(kept, weights, -weights).to(q.dtype)
