"""Speaking to people on stderr, and to programs in JSON on stdout."""

from __future__ import annotations

import json
import math
import sys
from typing import Any


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
