"""What ASTRA must know of each model family, and the hooks into unmodified Hugging Face models."""

from .base import Adapter, Listener, adapt, listening, with_cache

__all__ = ["Adapter", "Listener", "adapt", "listening", "with_cache"]
