"""What ASTRA must know of each model family, and the hooks into unmodified Hugging Face models."""

from .base import Adapter, Inputs, Listener, is_language_model, listening, with_cache
from .families import adapt

__all__ = [
    "Adapter",
    "Inputs",
    "Listener",
    "adapt",
    "is_language_model",
    "listening",
    "with_cache",
]
