"""What ASTRA must know of each model family, and the hooks into unmodified Hugging Face models."""

from .apart import Apart
from .attention import check_attention
from .base import (
    Adapter,
    Inputs,
    check_runnable,
    is_language_model,
    num_logits_of,
    vocabulary_of,
    with_cache,
)
from .dtypes import check_dtypes
from .families import adapt, pair
from .forward_pass import Listener, without_listener
from .heads import EVERY, ROW, check_head_module
from .watch import Watch

__all__ = [
    "EVERY",
    "ROW",
    "Adapter",
    "Apart",
    "Inputs",
    "Listener",
    "Watch",
    "adapt",
    "check_attention",
    "check_dtypes",
    "check_head_module",
    "check_runnable",
    "is_language_model",
    "num_logits_of",
    "pair",
    "vocabulary_of",
    "with_cache",
    "without_listener",
]
