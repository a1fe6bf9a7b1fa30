"""The command that a result names, and quiet beside its lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def quiet_transformers() -> None:
    """No bars and advice from libraries between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def stages(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """A progress for fits that says each stage once: told what is done, how far, of how much."""
    begun: set[str] = set()

    def show(what: str, done: int, steps: int) -> None:
        if what not in begun:
            begun.add(what)
            say(f"{what} ({steps} steps)")

    return show


def command_line(command: str, arguments: Sequence[str] | None = None) -> str:
    """`python -m COMMAND ARGUMENTS`, as a result file names it.

    Args:
        command: such as "bench.accuracy encoder".
        arguments: those given; None: those of this process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return " ".join(["python -m", command, *given])
