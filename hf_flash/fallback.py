"""Calls that our kernel does not serve: Transformers' own sdpa or eager attention, with the same visibility."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from . import support
from .packing import Visibility
from .report import ASKED_FOR, RECORD
from .support import Unsupported


class Options(NamedTuple):
    """What patch_model was asked for, as far as a call needs it."""

    on_fallback: str = "warn"
    fp32: str = "fallback"
    deterministic: bool | None = None
    excluded: bool = False
    original: str = "sdpa"


_DEFAULT = Options()


def options_of(module: nn.Module) -> Options:
    record = module.__dict__.get(RECORD)  # getattr would go through nn.Module's own search, which takes microseconds
    return _DEFAULT if record is None or record.options is None else record.options


def precision(query, key, value, options: Options):
    """q, k and v in the dtype to attend in: autocast's, or the one that patch_model's fp32 argument names."""
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        narrow = [t if t.dtype in (dtype, torch.float64) else t.to(dtype) for t in (query, key, value)]
        return *narrow, narrow[0].dtype
    if options.fp32 in ("bfloat16", "float16") and query.dtype == torch.float32:
        reason = support.device_reason(device, query.device.index, query.dtype)
        if reason is not None and reason[0] == "FP32":
            dtype = getattr(torch, options.fp32)
            return query.to(dtype), key.to(dtype), value.to(dtype), query.dtype
    return query, key, value, query.dtype


def _eager(module: nn.Module):
    """eager_attention_forward of the file that the module's class, or its parent, stands in."""
    for parent in type(module).__mro__:
        found = getattr(sys.modules.get(parent.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return _plain


def _plain(module, query, key, value, mask, scaling=None, dropout=0.0, position_bias=None, **others):
    """Attention with its weights, for modeling files that have no function for it. Shapes as in Transformers."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    for addition in (position_bias, mask):
        scores = scores if addition is None else scores + addition
    weights = scores.float().softmax(-1).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def _added(mask, bias: torch.Tensor) -> torch.Tensor:
    """A mask (bool, float or None) and a bias as one additive mask; older releases' sdpa drops position_bias."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def _needs_eager(reason: Unsupported, options: Options, keywords: dict) -> bool:
    """sdpa drops these in silence or refuses them; what an unknown keyword means the model's eager attention says."""
    if reason.code in ("OUTPUT_ATTENTIONS", "KEYWORD", "SCALING") or keywords["output_attentions"]:
        return True
    if keywords["softcap"] is not None or keywords["s_aux"] is not None:
        return True
    return options.original == "eager" and reason.code in ASKED_FOR


def fall_back(module, query, key, value, visible, reason: Unsupported, options: Options, keywords: dict):
    """Run a call in Transformers' own attention; arguments as for ``backend.attention_forward``."""
    eager = _eager(module) if _needs_eager(reason, options, keywords) else None
    q_length, k_length = query.shape[2], key.shape[2]
    mask, is_causal = visible, keywords["is_causal"]
    if isinstance(visible, Visibility):
        may_be_plain = eager is None and keywords["position_bias"] is None
        plain = visible.is_plain(q_length, k_length) if may_be_plain else None
        if plain is not None:
            mask, is_causal = None, plain == "causal"
        else:
            mask, is_causal = visible.dense(query.shape[0], q_length, k_length, query.device), False
            mask = mask.expand(query.shape[0], 1, q_length, k_length)
    if eager is None:
        keywords = {name: v for name, v in keywords.items() if v is not None and name != "output_attentions"}
        keywords["is_causal"] = is_causal
        bias = keywords.pop("position_bias", None)
        mask = mask if bias is None else _added(mask, bias)
        return AttentionInterface._global_mapping["sdpa"](module, query, key, value, mask, **keywords)
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros((), dtype=query.dtype, device=query.device).where(mask, lowest)
    keywords = {name: v for name, v in keywords.items() if v is not None}
    return eager(module, query, key, value, mask, **keywords)
