"""How many tokens a model reads, by its configuration alone; no torch, which takes seconds."""

from __future__ import annotations

from typing import Any, Final

# Families that count positions from behind the padding token's id, which their tables have, too.
BEHIND_PADDING: Final = ("roberta", "xlm-roberta")


def configured_limit(config: Any) -> int | None:
    """How many tokens a text model reads at most; None: its configuration names no number.

    Args:
        config: transformers' configuration, or the fields of a config.json as attributes.

    Example:
        >>> from types import SimpleNamespace
        >>> configured_limit(SimpleNamespace(model_type="bert", max_position_embeddings=512))
        512
        >>> configured_limit(SimpleNamespace(model_type="roberta", max_position_embeddings=514))
        512
    """
    limit = getattr(config, "max_position_embeddings", getattr(config, "n_positions", None))
    if limit is None:
        return None
    padding = getattr(config, "pad_token_id", 1)
    # None: its positions have no beginning, and an engine refuses it
    if getattr(config, "model_type", None) in BEHIND_PADDING and padding is not None:
        limit -= padding + 1
    return int(limit)
