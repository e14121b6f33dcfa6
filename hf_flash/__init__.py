"""Fast, exact attention for the models that people fine-tune on Hugging Face."""

from .attention import flash_attention

__version__ = "0.1.0"

__all__ = ["flash_attention"]
