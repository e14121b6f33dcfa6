"""Causal self-attention of decoder-only models: grouped heads, windows, softcaps and sinks come as keywords.

They go through Transformers' attention interface. A model that behaves like these is one line here.
"""

from hf_flash.registry import Behaviour, register

DECODER = Behaviour("causal self-attention", is_cross=lambda module: getattr(module, "is_cross_attention", False))

register(DECODER, "gpt2.GPT2Attention", "llama.LlamaAttention")
