"""Inputs that say nothing, to have everything made before the first real ones come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .inputs import check_integer
from .models import Adapter
from .store import token_limit

LENGTH = 128  # tokens, where nobody says


def example_inputs(adapter: Adapter, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Inputs of these lengths; an image where the model takes images."""
    config = adapter.model.config
    if not adapter.token_ids:
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        shape = (1, int(config.num_channels), int(height), int(width))
        return [{"pixel_values": torch.zeros(shape, dtype=adapter.dtype, device=adapter.device)}]
    limit = token_limit(adapter.model) or LENGTH
    asked = lengths or (min(limit, LENGTH) - adapter.class_tokens,)
    counts = [check_integer("lengths", n, 1, limit) + adapter.class_tokens for n in asked]
    return [
        {"input_ids": torch.zeros(1, count, dtype=torch.int64, device=adapter.device)}
        for count in counts
    ]
