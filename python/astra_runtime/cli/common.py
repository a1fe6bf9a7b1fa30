"""What every command does: speak, and load a model."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from ..errors import AstraError


def say(text: str) -> None:
    """A line for people: on stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    def finite(item: Any) -> Any:
        """JSON has no word for nan and infinity."""
        if isinstance(item, dict):
            return {name: finite(inner) for name, inner in item.items()}
        if isinstance(item, list | tuple):
            return [finite(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    print(json.dumps(finite(value), ensure_ascii=False, allow_nan=False), flush=True)


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
