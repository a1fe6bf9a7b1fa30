"""A small GPT-2, trained here and adapted to its codes: accuracy against bits."""

from collections.abc import Mapping
from typing import Any

KINDS = ("prose", "revised")  # of text, see `model`
# Permitted over exact perplexity, at so many times fewer bits than fp32 and so much of ideal FLOPs.
PERMITTED, FEWER, FLOPS = 0.138, 100, 1.25


def tells(row: Mapping[str, Any]) -> bool:
    """Whether a row says anything of a goal: dropping all remote tokens costs three times as much
    as is permitted."""
    return bool(row["dropped_over_exact"] >= 1 + 3 * PERMITTED)
