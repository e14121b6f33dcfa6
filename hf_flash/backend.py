"""Everything that Transformers sees: the attention function, and how it and the mask function get registered.

This file and ``masks.py`` alone touch Transformers' private names; ``tests/transformers`` runs on the newest release,
and for some models on older ones (``make test-oldest``). The word "flash" in our name makes Transformers look for a
package of flash-attn's functions (``_lazy_imports``), so :func:`install` answers that question for our name.
"""

from __future__ import annotations

import functools

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:  # some import well and then lose a model's causality
    raise ImportError(f"transformers >= 5.0 is needed, this is {transformers.__version__}")

import transformers.modeling_flash_attention_utils as flash_utils
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

try:
    from transformers.utils.output_capturing import _active_collector as _COLLECTOR
except ImportError:  # transformers 5.0
    _COLLECTOR = None

from . import attention, packing, registry, report, support
from .fallback import Options, fall_back, options_of, precision
from .masks import make_mask
from .packing import Visibility, is_traced, key_ranges, packing_from_cu_seqlens, packing_from_ids, tokens_of_heads
from .support import Unsupported

NAME = "hf_flash"

# Keywords that carry no meaning for the attention itself; any other that is not None makes the call fall back.
_PASSIVE = {
    "cache_position", "ignore_index", "labels", "layer_idx", "logits_to_keep", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "query_length",
    "return_dict", "shift_labels", "token_type_ids", "use_cache",
}  # fmt: skip

_PAGES = ("block_table", "read_index", "write_index")  # of continuous batching's cache


def _implied(module, q_length, k_length, is_causal, sliding_window, padding=None) -> Visibility:
    """What no mask at all, or a 2D padding mask, means: scaled_dot_product_attention's convention.

    Causal stands top-left, and keys beyond the queries (a static cache's free places) are not seen.
    """
    causal = (is_causal if is_causal is not None else getattr(module, "is_causal", True)) and q_length > 1
    left = right = -1
    if sliding_window is not None:
        left = right = sliding_window - 1
    right = 0 if causal else right
    offset = 0 if q_length > 1 else k_length - 1
    key_range, mask = (None, None) if padding is None else key_ranges(padding.to(torch.bool, copy=True))
    return Visibility(
        1 if padding is None else padding.shape[0], q_length, k_length, window=(left, right), query_offset=offset,
        key_range=key_range, mask=mask, unpadded=padding is None,
    )  # fmt: skip


def _visibility(module, mask, query, key, is_causal, sliding_window) -> Visibility | torch.Tensor:
    """The mask argument as Visibility; a 4D tensor stays."""
    q_length, k_length = query.shape[2], key.shape[2]
    if mask is None:
        return _implied(module, q_length, k_length, is_causal, sliding_window)
    if isinstance(mask, Visibility):
        if is_causal is False and getattr(module, "is_causal", False) and mask.window[1] == 0:
            return mask.bidirectional()  # a decoder asked to work as an encoder
        return mask
    if mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point()):
        return mask
    if mask.dim() == 2 and tuple(mask.shape) == (key.shape[0], k_length):
        return _implied(module, q_length, k_length, is_causal, sliding_window, mask)
    raise ValueError(
        f"hf_flash [MASK]: attention_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; it must be 2D of shape "
        f"(batch, keys) = {(key.shape[0], k_length)}, or 4D, bool (True = visible) or floating point (added)"
    )


def _packed(visible, behaviour, module, query, key, position_ids, cu_seq_lens, seq_idx) -> Visibility | torch.Tensor:
    """Add the packing that keywords announce. Never lets two packed sequences see each other."""
    cu_q, cu_k, max_q, max_k = cu_seq_lens
    one_row = query.shape[0] == 1 and query.shape[2] > 1
    cross = behaviour.is_cross(module)
    if cu_q is not None or cu_k is not None or (seq_idx is not None and one_row):
        whole = (cu_q is None) == (cu_k is None) and isinstance(visible, Visibility) and visible.own_mask
        if is_traced() and one_row and not cross and whole:
            return visible.with_dense_packing(cu_q, cu_k, seq_idx)
        # Transformers may have read this packing out of position_ids already (visible.ids); cu_seq_lens repeats it
        if cross or not isinstance(visible, Visibility) or visible.hides_keys():
            what = "an attention_mask that hides keys; pass padded batches there, or packed ones without a mask"
            if cross:
                what = "cross-attention; pass padded batches there"
            elif is_traced():
                what = "an attention_mask, whose values cannot be looked at under torch.compile; leave the mask out"
            raise ValueError(
                f"hf_flash [PACKED]: {type(module).__name__} got packed sequences (cu_seq_lens_q, cu_seq_lens_k or "
                f"seq_idx) together with {what}"
            )
        if query.shape[0] != 1:
            raise ValueError(
                f"hf_flash [PACKED]: cu_seq_lens_q and cu_seq_lens_k came with a batch of {query.shape[0]}; packed "
                "sequences lie in one row, of shape (1, tokens)"
            )
        if cu_q is None or cu_k is None:
            if seq_idx is None:
                raise ValueError("hf_flash [PACKED]: cu_seq_lens_q and cu_seq_lens_k go together; pass both")
            return visible.with_packing(seq_idx, lambda: packing_from_ids(seq_idx.reshape(1, -1)))
        return visible.with_packing(cu_q, lambda: packing_from_cu_seqlens(cu_q, cu_k, max_q, max_k))
    if not (one_row and isinstance(visible, Visibility) and position_ids is not None and position_ids.dim() == 2):
        return visible
    if position_ids.shape != (1, query.shape[2]) or not (visible.unpadded or cross):
        return visible
    if cross:
        if not is_traced() and visible.packed_by(position_ids) is not visible:
            raise ValueError(
                f"hf_flash [PACKED]: position_ids restart, so the batch holds packed sequences, and "
                f"{type(module).__name__} attends to another sequence: which part belongs to which is not known. Pass "
                "padded batches instead"
            )
        return visible
    return visible.packed_by(position_ids) if query.shape[2] == key.shape[2] else visible


def collects_attentions() -> bool:
    """Whether the model's outputs will hold attention weights; some modules keep output_attentions to themselves."""
    if _COLLECTOR is None or torch.compiler.is_compiling():
        return False
    collected = _COLLECTOR.get()
    return collected is not None and any("attention" in key for key in collected)


def _refusal(behaviour, module, options: Options, output_attentions, cache, others) -> Unsupported | None:
    """Why a call is not for our kernel, as far as that is known before looking at its tensors."""
    if report.disabled():
        return Unsupported("DISABLED", "HF_FLASH_DISABLE=1 is set; unset it")
    if options.excluded:
        return Unsupported("EXCLUDED", "patch_model was told to leave this module out")
    if behaviour is None:
        return registry.class_reason(type(module))
    if output_attentions or collects_attentions():
        return Unsupported(
            "OUTPUT_ATTENTIONS",
            "the weights asked for by output_attentions=True are never stored by a fused kernel; leave it out where "
            "nobody reads them",
        )
    refused = None if behaviour.refuse is None else behaviour.refuse(module)
    if refused is not None:
        return refused
    if cache is not None or (others and any(others.get(name) is not None for name in _PAGES)):
        return Unsupported(
            "PAGED_CACHE", "continuous batching's paged cache is not supported; use attn_implementation='sdpa' there"
        )
    unknown = sorted(name for name, value in others.items() if value is not None and value is not False)
    unknown = [name for name in unknown if name not in _PASSIVE]
    if unknown:
        return Unsupported("KEYWORD", f"the keywords {unknown} may change what is computed and are not known")
    return None


def _addition(bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return bias if bias.dtype in (dtype, torch.float32) else bias.float()


def attention_forward(
    module: nn.Module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None,
    sliding_window=None, softcap=None, position_bias=None, s_aux=None, position_ids=None, cu_seq_lens_q=None,
    cu_seq_lens_k=None, max_length_q=None, max_length_k=None, seq_idx=None, output_attentions=None,
    deterministic=None, cache=None, **others,
):  # fmt: skip
    """Transformers' attention function. q (B, Hq, Sq, D), k and v (B, Hk, Sk, D); returns (out (B, Sq, Hq, Dv), None).

    What our kernel cannot do goes to Transformers' own attention with a reason in the report, or raises if so asked.
    """
    options = options_of(module)
    behaviour = registry.behaviour_of(type(module))
    visible = _visibility(module, attention_mask, query, key, is_causal, sliding_window)
    if behaviour is not None:
        keywords = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        visible = _packed(visible, behaviour, module, query, key, position_ids, keywords, seq_idx)
        if position_bias is not None and behaviour.no_bias(module):
            position_bias = None
    reason = _refusal(behaviour, module, options, output_attentions, cache, others)
    q, k, v, out_dtype = precision(query, key, value, options)
    if reason is None:
        if k.shape[0] != q.shape[0] and k.shape[0] == 1:  # one encoder output for several decoder rows
            k, v = (t.expand(q.shape[0], -1, -1, -1) for t in (k, v))
        call = {
            "scale": scaling, "softcap": softcap or 0.0, "dropout_p": dropout,
            "deterministic": options.deterministic if options.deterministic is not None else deterministic,
        }  # fmt: skip
        bias = position_bias
        if isinstance(visible, Visibility):
            call |= visible.arguments(q.shape[0], q.shape[2], k.shape[2], q.device)
        elif visible.dtype == torch.bool:
            call["mask"] = visible[..., : k.shape[2]]
        else:
            given = visible[..., : k.shape[2]]
            bias = given if bias is None else bias + given
        if bias is not None:
            call["bias"] = packing.packed_bias(_addition(bias, q.dtype), behaviour.relative_bias, call)
        if s_aux is not None:
            call["sink"] = _addition(s_aux, q.dtype)
        packed = "cu_seqlens_q" in call
        if packed:
            q, k, v = (tokens_of_heads(t) for t in (q, k, v))
        reason = support.unsupported(q, k, v, heads_first=not packed, **call)
    if reason is None:
        out = attention.judged_attention(q, k, v, heads_first=not packed, **call)
        report.count_served(module)
        out = out.unflatten(0, (query.shape[0], -1)) if packed else out
        return out if out.dtype == out_dtype else out.to(out_dtype), None
    if reason.code == "ARGUMENT" or (reason.code == "FP32" and options.fp32 == "error"):
        raise reason.exception()
    report.note_fallback(module, reason, options.on_fallback)
    others |= {
        "dropout": dropout, "scaling": scaling, "is_causal": is_causal, "softcap": softcap,
        "position_bias": position_bias, "s_aux": s_aux, "output_attentions": output_attentions, "cache": cache,
    }  # fmt: skip
    return fall_back(module, query, key, value, visible, reason, options, others)


# ---------------------------------------------------------------- registration


def _answer_lazy_imports(original):
    """Transformers asks for flash-attn's functions under every name with "flash" in it; these are ours."""
    newer = hasattr(flash_utils, "_flash_with_kvcache_fn")  # since 5.5 or so a fifth function is expected

    @functools.wraps(original)
    def _lazy_imports(implementation, *args, **kwargs):
        if implementation != NAME:
            return original(implementation, *args, **kwargs)
        functions = (attention.flash_attn_func, attention.flash_attn_varlen_func)
        pad = (flash_utils._pad_input, flash_utils._unpad_input)
        return (*functions, None, *pad) if newer else (*functions, *pad)

    return _lazy_imports


def attach_rules(model: nn.Module) -> None:
    """Register the forward pre-hooks that some models need (``ModelRule.prepare``), once."""
    for module in model.modules():
        rule = registry.rule_of(type(module))
        if rule is None or rule.prepare is None or rule.prepare in module._forward_pre_hooks.values():
            continue
        module.register_forward_pre_hook(rule.prepare, with_kwargs=True)


def detach_rules(model: nn.Module) -> None:
    """Remove those hooks again, except where ``attn_implementation`` asks for us without patch_model."""
    for module in model.modules():
        rule = registry.rule_of(type(module))
        if rule is None or getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME:
            continue
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is rule.prepare]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _raise_for(model) -> None:
    reason = registry.interface_reason(type(model))
    if reason is not None:
        raise ValueError(
            f"hf_flash [{reason.code}]: {type(model).__name__} cannot use attn_implementation='{NAME}': "
            f"{reason.sentence}"
        )


def _check_model(original):
    """Refuse models off the list where from_pretrained, from_config and set_attn_implementation come by, before
    Transformers looks for other kernels with "flash" in their name."""

    @functools.wraps(original)
    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation == NAME:
            _raise_for(self)
            attach_rules(self)
        return original(self, attn_implementation, *args, **kwargs)

    return _check_and_adjust_attn_implementation


def _check_switch(original):
    """set_attn_implementation only warns where a model is off the interface; with our name it raises."""

    @functools.wraps(original)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation == NAME:
            for module in self.modules():
                if isinstance(module, PreTrainedModel):
                    _raise_for(module)
        original(self, attn_implementation, *args, **kwargs)
        if attn_implementation == NAME:
            attach_rules(self)

    return set_attn_implementation


def install() -> None:
    """Register the name with Transformers. Safe to call again."""
    if NAME in AttentionInterface._global_mapping:
        return
    registry.load_patches()
    flash_utils._lazy_imports = _answer_lazy_imports(flash_utils._lazy_imports)
    PreTrainedModel._check_and_adjust_attn_implementation = _check_model(
        PreTrainedModel._check_and_adjust_attn_implementation
    )
    PreTrainedModel.set_attn_implementation = _check_switch(PreTrainedModel.set_attn_implementation)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


# At the end and not by autoload.py alone: where this file is what imports Transformers' modeling code, autoload hears
# of that while only half of this file has been executed.
install()
