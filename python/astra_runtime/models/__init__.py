"""What ASTRA must know of each model family, and the hooks into unmodified Hugging Face models."""

from .base import Adapter, Inputs, check_runnable, is_language_model, with_cache
from .dtypes import check_dtypes
from .families import adapt
from .heads import EVERY, ROW, check_head_module
from .hooks import Listener, check_attention
from .watch import Watch

__all__ = [
    "EVERY",
    "ROW",
    "Adapter",
    "Inputs",
    "Listener",
    "Watch",
    "adapt",
    "check_attention",
    "check_dtypes",
    "check_head_module",
    "check_runnable",
    "is_language_model",
    "with_cache",
]
