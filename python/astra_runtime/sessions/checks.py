"""Checks of what methods of sessions are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..engine_parts import EngineParts
from ..inputs import check_inputs, check_integer
from ..models import vocabulary_of
from .answers import token_limit


def listed(name: str, values: Any) -> list[Any]:
    """Raises TypeError for what cannot be gone through."""
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"{name}: expected a list, got {type(values).__name__}") from None


def check_rank(engine: EngineParts, rank: Any) -> int:
    """One of the engine's ranks."""
    return check_integer("rank", rank, 0, engine.mesh.world_size - 1)


def check_tokens(engine: EngineParts, tokens: Sequence[int], past: int) -> list[int]:
    """New tokens behind `past` others: ids of the model, no more than fit its limit."""
    vocabulary, room = vocabulary_of(engine.model), token_limit(engine) + 1 - past
    tokens = listed("tokens", tokens)
    if len(tokens) > room:
        raise ValueError(f"tokens: expected at most {room} behind {past}, got {len(tokens)}")
    return [check_integer("tokens", token, 0, vocabulary - 1) for token in tokens]


def check_ids(engine: EngineParts, ids: Any, past: int) -> Tensor:
    """New tokens behind `past` others, as int64 [1, T].

    Raises TypeError or ValueError: ids that the model does not have, more than fit its limit.
    """
    given = check_inputs(engine.adapter, {"input_ids": ids})["input_ids"]
    if given.shape[0] != 1:
        raise ValueError(f"ids: expected shape [1, T], got {list(given.shape)}")
    limit = token_limit(engine)
    if past + given.shape[1] > limit:
        raise ValueError(
            f"ids: expected at most {limit - past} tokens behind {past}, as the model's limit is "
            f"{limit}, got {given.shape[1]}"
        )
    return given.long()
