"""What ASTRA must know of each model family, and the hooks into unmodified Hugging Face models."""

from .base import Adapter, Listener, adapt, listening

__all__ = ["Adapter", "Listener", "adapt", "listening"]
