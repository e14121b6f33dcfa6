"""Fast, exact attention for the models that people fine-tune on Hugging Face."""

from .attention import flash_attention
from .version import __version__

__all__ = ["__version__", "flash_attention"]
