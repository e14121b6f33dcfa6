"""T5: scores without a scale, plus a learned bias for each head and distance, shared by all layers, with a gradient.

Newer releases of Transformers go through the attention interface. In older ones T5Attention computes by itself and adds
the mask into the bias of the first layer; there ``patch_model`` gives it the forward below, which keeps them apart.
"""

import torch
from transformers import AttentionInterface
from transformers.cache_utils import EncoderDecoderCache

from hf_flash.registry import Behaviour, register


def is_cross(module) -> bool:
    """Whether a module is a decoder's attention over the encoder; older releases have no ``is_causal`` to tell."""
    return module.is_decoder and not getattr(module, "is_causal", not getattr(module, "_attends_over_encoder", False))


class T5Forward:
    """T5Attention's forward for releases before the attention interface; arguments and results as there."""

    def _heads(self, states, projection):
        return projection(states).view(*states.shape[:2], self.n_heads, self.key_value_proj_dim).transpose(1, 2)

    def _keys_and_values(self, hidden_states, encoder_states, past_key_values, cache_position):
        """Keys and values (B, H, Sk, D): fresh, from the cache, or both."""
        cache, cross = past_key_values, encoder_states is not None
        both = isinstance(cache, EncoderDecoderCache)
        if both:
            cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache
            if cross and past_key_values.is_updated.get(self.layer_idx):
                return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        states = encoder_states if cross else hidden_states
        keys, values = self._heads(states, self.k), self._heads(states, self.v)
        if cache is not None:
            told = () if cross or cache_position is None else ({"cache_position": cache_position},)
            keys, values = cache.update(keys, values, self.layer_idx, *told)
            if cross and both:
                past_key_values.is_updated[self.layer_idx] = True
        return keys, values

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_values=None,
        query_length=None, use_cache=False, output_attentions=False, cache_position=None, **kwargs,
    ):  # fmt: skip
        seqlen, length, place = hidden_states.shape[1], query_length, {"cache_position": cache_position}
        query = self._heads(hidden_states, self.q)
        makes_bias = position_bias is None and self.has_relative_attention_bias  # the first layer's, for all
        if makes_bias and query_length is None and cache_position is None:  # transformers 5.4 and later tell neither
            past = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
            # A static cache counts on in this very tensor.
            length, place = seqlen, {"past_seen_tokens": past.clone() if isinstance(past, torch.Tensor) else past}
        keys, values = self._keys_and_values(hidden_states, key_value_states, past_key_values, cache_position)
        if makes_bias:
            length = int(cache_position[-1]) + 1 if length is None else length
            position_bias = self.compute_bias(length, keys.shape[2], device=query.device, **place)[:, :, -seqlen:]
        self._attends_over_encoder = key_value_states is not None
        try:
            out, weights = AttentionInterface._global_mapping["hf_flash"](
                self, query, keys, values, mask, dropout=self.dropout if self.training else 0.0, scaling=1.0,
                position_bias=position_bias, output_attentions=output_attentions,
            )  # fmt: skip
        finally:
            del self._attends_over_encoder
        out = self.o(out.reshape(*hidden_states.shape[:2], self.inner_dim))
        return (out, position_bias, weights) if output_attentions else (out, position_bias)


register(
    Behaviour("relative bias", is_cross=is_cross, no_bias=is_cross, relative_bias=True, replacement=T5Forward),
    "t5.T5Attention",
)
