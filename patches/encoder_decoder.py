"""One attention class in three roles (encoder, decoder, decoder over encoder), as in BART.

They go through Transformers' attention interface, which does not say which role a module plays; its flags do. A model
that behaves like BART is one line here.
"""

from hf_flash.registry import Behaviour, register


def is_cross(module) -> bool:
    """A decoder's module that is not causal attends to the encoder's states."""
    return module.is_decoder and not module.is_causal


register(Behaviour("encoder-decoder attention", is_cross=is_cross), "bart.BartAttention")
