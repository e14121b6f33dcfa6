"""Fast, exact attention for the models that people fine-tune on Hugging Face."""

import importlib

from . import autoload
from .attention import (
    flash_attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .modules import FlashAttention, FlashMHA
from .version import __version__

# These need Transformers, which is imported when one of them is first asked for.
_LAZY = {
    "FlashAttentionCallback": "trainer",
    "explain": "patching",
    "is_patched": "patching",
    "patch_model": "patching",
    "patched": "patching",
    "unpatch_model": "patching",
}

__all__ = [
    "FlashAttention",
    "FlashMHA",
    "__version__",
    "flash_attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    *_LAZY,
]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *__all__})


autoload.watch()
