"""A leader on rank 0 whose requests are timed, again and again, and ranks that follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from astra_runtime.serve import Leader, follow
from astra_runtime.store import load_tokenizer
from bench.latency.processes import RankSettings, rank_of

T = TypeVar("T")


def led(
    setup: RankSettings, times: int, measure: Callable[[Leader, list[int]], dict[str, T]]
) -> dict[str, list[T]]:
    """On rank 0 what `measure` found so many times, by name; nothing on the others.

    Args:
        measure: gets the leader and the prompt's ids; once more before, to warm up.
    """
    found: dict[str, list[Any]] = {}
    with rank_of(setup, setup.tokens) as (subject, _, engine):
        if setup.rank:
            follow(engine)
            return found
        ids = subject.inputs["input_ids"][0].tolist()
        # no token ends an answer before its time
        with Leader(engine, load_tokenizer(setup.model), ends=()) as leader:
            measure(leader, ids)
            for _ in range(times):
                for name, one in measure(leader, ids).items():
                    found.setdefault(name, []).append(one)
    return found
