"""A small GPT-2, trained here and adapted to its codes: accuracy against bits."""

from collections.abc import Iterable, Mapping
from typing import Any

KINDS = ("prose", "revised")  # of text, see `model`
# Permitted over exact perplexity, at so many times fewer bits than fp32 and so much of ideal FLOPs.
PERMITTED, FEWER, FLOPS = 0.06, 100, 1.2


def tells(row: Mapping[str, Any]) -> bool:
    """Whether a row says anything of a goal: dropping all remote tokens costs three times as much
    as is permitted."""
    return bool(row["dropped_over_exact"] >= 1 + 3 * PERMITTED)


def reached(row: Mapping[str, Any]) -> bool:
    """Whether a row keeps to what is permitted."""
    return bool(row["ratio_to_exact"] <= 1 + PERMITTED and row["flops_over_ideal"] <= FLOPS)


def best(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row that says how near the goal is: of few enough bits the one with the lowest perplexity
    of those that reach it, or, if none does, of all; None without such rows."""
    few = [row for row in rows if row["compression"] and row["compression"] >= FEWER]
    among = list(filter(reached, few)) or few
    return min(among, key=lambda row: row["ratio_to_exact"], default=None)
