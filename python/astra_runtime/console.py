"""Speaking to people on stderr, and to programs in JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SILENCE = 8.0  # seconds after which `working` says what is still going on
_last_line = time.monotonic()
_tasks: list[object] = []  # what is going on, the innermost last


def say(text: str) -> None:
    """A line for people: on stderr, so that stdout holds results only.

    Where nobody can read it, on a full disk for example, work goes on all the same.
    """
    global _last_line
    _last_line = time.monotonic()
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def working(what: str | Callable[[], str], *, silence: float = SILENCE) -> Iterator[None]:
    """While the block runs, says `what` it is at whenever `silence` seconds passed without a line.

    Args:
        what: a few words, or a function that gives them at the time.
    """
    begun, over = time.monotonic(), threading.Event()
    _tasks.append(over)

    def remind() -> None:
        while not over.wait(max(0.05, max(begun, _last_line) + silence - time.monotonic())):
            quiet = time.monotonic() - max(begun, _last_line)
            if _tasks[-1] is over and quiet >= silence:
                words = what if isinstance(what, str) else what()
                say(f"{words} … {time.monotonic() - begun:.0f} s")

    reminder = threading.Thread(target=remind, name="astra-working", daemon=True)
    reminder.start()
    try:
        yield
    finally:
        _tasks.remove(over)
        over.set()
        reminder.join()


class ReaderLeft(BrokenPipeError):
    """Whoever read stdout has left, as `head` does: no error, unlike a peer's broken connection."""


def show(text: str) -> None:
    """`text` on stdout, at once. An OSError that this meets names stdout, or is `ReaderLeft`."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise ReaderLeft(error.errno, f"stdout: {error.strerror}") from error
    except OSError as error:
        raise OSError(error.errno, f"stdout: {error.strerror}") from error


def show_json(value: Any) -> None:
    """`value` as one JSON object on stdout, in ASCII escapes where stdout is not UTF-8."""

    def finite(item: Any) -> Any:
        """JSON has no word for nan and infinity."""
        if isinstance(item, dict):
            return {name: finite(inner) for name, inner in item.items()}
        if isinstance(item, list | tuple):
            return [finite(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    ascii_only = (getattr(sys.stdout, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")
    show(json.dumps(finite(value), ensure_ascii=ascii_only, allow_nan=False) + "\n")
