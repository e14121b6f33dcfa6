"""Causal self-attention of decoder-only models: grouped heads, windows, softcaps and sinks come as keywords.

They go through Transformers' attention interface. A model that behaves like these is one line here.
"""

from dataclasses import replace

from hf_flash.registry import Behaviour, register
from hf_flash.support import Unsupported

DECODER = Behaviour("causal self-attention", is_cross=lambda module: getattr(module, "is_cross_attention", False))

register(DECODER, "llama.LlamaAttention")


def unspoken_scaling(module) -> Unsupported | None:
    """transformers 5.0 keeps GPT-2's own factors inside its eager attention and hands no ``scaling`` on."""
    own = not module.scale_attn_weights or module.scale_attn_by_inverse_layer_idx
    if own and not hasattr(module, "scaling"):
        return Unsupported("SCALING", "this Transformers release tells the factor of the scores to nobody; use a newer")
    return None


register(replace(DECODER, refuse=unspoken_scaling), "gpt2.GPT2Attention")
