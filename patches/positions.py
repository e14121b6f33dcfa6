"""Models that do not hand ``position_ids`` (or cu_seq_lens keywords) on to their attention.

Packed sequences would see each other there without anyone noticing, so they are recognised where the model is called
and travel in place of the mask. A model that behaves like these is one line here.
"""

import inspect

from hf_flash.packing import Visibility, is_traced, packing_from_cu_seqlens, sequence_ids
from hf_flash.registry import ModelRule, register_model

CACHE = ("cache", "past_key_values")  # the name since transformers 5.24, and the one before
KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _packed(module, given: dict, window) -> Visibility | None:
    """The packing that a model's arguments announce, None where they announce none."""
    ids = given.get("input_ids")
    shape = ids.shape if ids is not None else given["inputs_embeds"].shape[:2]
    positions = given.get("position_ids")
    cache = next((given[name] for name in CACHE if given.get(name) is not None), None)
    if shape[0] != 1 or given.get("attention_mask") is not None:
        return None
    lengths = given.get("cu_seq_lens_q") is not None and given.get("cu_seq_lens_k") is not None
    if not lengths and (positions is None or positions.shape != (1, shape[1])):
        return None  # before the cache is asked: the length of a static one stands on the device
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0):
        return None  # continuous batching's cache tells no length
    if lengths:
        packing = packing_from_cu_seqlens(*(given.get(name) for name in KEYWORDS))
        return Visibility(1, shape[1], shape[1], window=window, packing=packing)
    numbers = sequence_ids(positions)
    if not is_traced() and not numbers[:, -1:].any():
        return None
    return Visibility(1, shape[1], shape[1], window=window, ids=numbers)


def _announce(module, args, kwargs, window):
    if module.config._attn_implementation != "hf_flash":
        return None
    signature = inspect.signature(module.forward)  # perhaps a forward that was replaced by one of any arguments
    given = signature.bind_partial(*args, **kwargs).arguments
    keeps_weights = given.get("output_attentions")
    others = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    given |= given.pop(others, {})
    if given.get("input_ids") is None and given.get("inputs_embeds") is None:
        return None  # the model itself will complain
    if keeps_weights:  # an argument of its own is not handed on; newer releases collect by hooks
        raise ValueError(
            f"hf_flash [OUTPUT_ATTENTIONS]: {type(module).__name__} of this Transformers release does not tell its "
            "attention about output_attentions=True; unpatch the model for that call, or use a newer release"
        )
    visible = _packed(module, given, window)
    if visible is None:
        return None
    if given.get("encoder_hidden_states") is not None:
        raise ValueError(
            f"hf_flash [PACKED]: {type(module).__name__} got packed sequences together with encoder_hidden_states: "
            "which part belongs to which is not known. Pass padded batches instead"
        )
    names = list(signature.parameters)
    place = names.index("attention_mask") if "attention_mask" in names else len(args)
    kwargs = {name: value for name, value in kwargs.items() if name not in KEYWORDS}
    if place < len(args):
        return (*args[:place], visible, *args[place + 1 :]), kwargs
    return args, kwargs | {"attention_mask": visible}


def announce_to_encoder(module, args, kwargs):
    """Forward pre-hook of a bidirectional model."""
    return _announce(module, args, kwargs, (-1, -1))


def announce_to_decoder(module, args, kwargs):
    """Forward pre-hook of a causal model."""
    return _announce(module, args, kwargs, (-1, 0))


def refuse_packing(module, args, kwargs):
    """Forward pre-hook of T5's stacks: releases before the attention interface swallow cu_seq_lens keywords."""
    told = any(kwargs.get(name) is not None for name in KEYWORDS)
    if told and module.config._attn_implementation == "hf_flash" and not _hands_on(module):
        raise ValueError(
            f"hf_flash [PACKED]: {type(module).__name__} of this Transformers release does not hand cu_seq_lens "
            "keywords on to its attention; pass padded batches, or use a newer release"
        )


def _hands_on(stack) -> bool:
    attention = next(type(m) for m in stack.modules() if type(m).__name__ == "T5Attention")
    original = [cls for cls in attention.__mro__ if cls.__name__ == "T5Attention"][-1]  # under a swapped subclass
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(original.__dict__["forward"]).__code__.co_names


register_model(ModelRule(prepare=refuse_packing), "t5.T5Stack")
register_model(ModelRule(prepare=announce_to_encoder), "distilbert.DistilBertModel")
register_model(ModelRule(prepare=announce_to_decoder), "gpt2.GPT2Model")  # transformers 5.0 hands nothing on
