"""``padding_free=True``: encoders that drop padding tokens before their first layer and put them back after the last.

Every matrix product of the stack then works on real tokens alone. The stack gets a subclass with the forward below; a
model whose stack of layers behaves like BertEncoder is one line here.
"""

import torch
from torch.nn import functional as F

from hf_flash import backend, support
from hf_flash.fallback import options_of, precision
from hf_flash.packing import Packing, Visibility, is_traced
from hf_flash.registry import ModelRule, behaviour_of, register_model


def _valid_tokens(visible: Visibility, batch: int, length: int, device) -> torch.Tensor | None:
    """bool (B, S) of the tokens that others see, None where dropping the rest would change what is computed."""
    tokens = Visibility(batch, 1, length, key_range=visible.key_range, mask=visible.mask)
    if visible.mask is not None and visible.mask.shape[1:3] != (1, 1):
        return None  # a mask with rows of its own
    return tokens.dense(batch, 1, length, device).expand(batch, 1, 1, length)[:, 0, 0]


def _config(stack):
    """A stack's config; DistilBERT's has none of its own, but its layers do."""
    return next(module.config for module in stack.modules() if hasattr(module, "config"))


def _kernel_serves(stack, states: torch.Tensor, config) -> bool:
    """Packed attention in a fallback would be quadratic in all tokens of the batch, so it must not come to that."""
    options = next(options_of(module) for module in stack.modules() if behaviour_of(type(module)) is not None)
    nothing = states[:0]
    dtype = precision(nothing, nothing, nothing, options)[0].dtype
    head_dim = config.hidden_size // config.num_attention_heads
    device = states.device
    return support.device_reason(device.type, device.index, dtype) is None and head_dim % 8 == 0 and head_dim <= 256


class PaddingFree:
    """Mixin for a stack of layers: ``forward(hidden_states, attention_mask, ..., **kwargs)`` with one result of the
    same shape as ``hidden_states`` in ``last_hidden_state`` (or as the first of a tuple)."""

    def _tokens(self, states, visible, others: dict) -> torch.Tensor | None:
        """Which tokens to keep, or None: nothing to drop, or something that needs all places."""
        config = _config(self)
        asked = ("output_hidden_states", "output_attentions")
        if any(others.get(name) or getattr(config, name, False) for name in asked):
            return None  # each layer's results would have to be put back
        if any(others.get(name) is not None for name in ("encoder_hidden_states", "cache", "past_key_values")):
            return None  # "cache" is what transformers 5.24 and later call past_key_values
        if getattr(config, "chunk_size_feed_forward", 0) or is_traced():
            return None
        if not isinstance(visible, Visibility) or visible.window != (-1, -1) or visible.unpadded:
            return None
        if backend.report.disabled() or not visible.hides_keys():
            return None
        if config._attn_implementation != backend.NAME or not _kernel_serves(self, states, config):
            return None
        return _valid_tokens(visible, *states.shape[:2], states.device)

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        keep = None if args else self._tokens(hidden_states, attention_mask, kwargs)
        places = None if keep is None else keep.reshape(-1).nonzero().flatten()
        if places is None or len(places) == 0:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        batch, length = keep.shape
        lengths = keep.sum(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        packing = Packing(cu_seqlens, cu_seqlens, length, length)
        packed = hidden_states.reshape(batch * length, -1).index_select(0, places)[None]
        visible = Visibility(1, packed.shape[1], packed.shape[1], packing=packing)
        kwargs.pop("position_ids", None)  # already in the embeddings
        out = super().forward(packed, visible, **kwargs)

        def put_back(states):
            full = states.new_zeros(batch * length, states.shape[-1])
            return full.index_copy(0, places, states[0]).view(batch, length, -1)

        if isinstance(out, tuple):
            return (put_back(out[0]), *out[1:])
        out.last_hidden_state = put_back(out.last_hidden_state)
        return out


register_model(
    ModelRule(padding_free=PaddingFree),
    "bert.BertEncoder",
    "roberta.RobertaEncoder",
    "xlm_roberta.XLMRobertaEncoder",
    "camembert.CamembertEncoder",
    "electra.ElectraEncoder",
    "distilbert.Transformer",
    "albert.AlbertTransformer",
)
