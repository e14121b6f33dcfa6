"""Fast, exact attention for the models that people fine-tune on Hugging Face."""

import importlib
import importlib.util
import sys

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
]


def _has_transformers() -> bool:
    return bool(sys.modules.get("transformers") or importlib.util.find_spec("transformers"))


if _has_transformers():
    __all__ += [*_LAZY]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if not _has_transformers():
            raise ImportError(f"hf_flash.{name} needs transformers >= 5.0: pip install 'hf_flash[transformers]'")
        importlib.import_module(".backend", __name__)  # first of all, since it knows releases that are too old
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    except ImportError as error:
        if sys._getframe(1).f_code.co_name == "_handle_fromlist":  # `from hf_flash import`, which forgets other errors
            raise
        raise AttributeError(str(error)) from error  # what hasattr and inspect.getmembers expect


def __dir__():
    return sorted({*globals(), *__all__})


autoload.watch()
