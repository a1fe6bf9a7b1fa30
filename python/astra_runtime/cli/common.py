"""What every command does: load a model."""

from __future__ import annotations

from typing import Any

from ..errors import AstraError


def quiet_transformers() -> None:
    """No bars and advice from libraries between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(name: str, *, decoder: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer by name; `decoder`: only a model that can continue a text will do."""
    from ..models import adapt
    from ..store import load_model, load_tokenizer

    quiet_transformers()
    model = load_model(name)
    if not (adapt(model).causal and hasattr(model, "lm_head")) and decoder:
        raise AstraError(f"model {name!r}: expected a language model that continues texts")
    return model, load_tokenizer(name)
