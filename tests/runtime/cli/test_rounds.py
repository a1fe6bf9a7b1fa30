"""Rounds of two methods in turns: how many there are, and what is said of who disturbed them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from astra_runtime.cli.rounds import MOST, Sample, disturbance, in_turns, known, ratios
from astra_runtime.contention import Contention


def rounds_of(
    single: Iterator[float], ours: Iterator[float], rounds: int, tick: float = 0.0
) -> tuple[dict[str, list[Sample]], list[str]]:
    order: list[str] = []

    def method(name: str, seconds: Iterator[float]) -> Sample:
        order.append(name)
        return Sample(next(seconds), 1.0)

    methods = {
        "single": lambda: method("single", single),
        "astra": lambda: method("astra", ours),
    }
    clock = itertools.count(0.0, tick)
    return in_turns(methods, rounds, ("single", "astra"), lambda: next(clock)), order


def test_a_steady_ratio_takes_the_rounds_asked_for_in_turns() -> None:
    taken, order = rounds_of(itertools.repeat(2.0), itertools.repeat(1.0), 3)
    assert order == ["single", "astra", "astra", "single", "single", "astra"]
    assert ratios(taken["single"], taken["astra"]) == [2.0, 2.0, 2.0]


def test_an_unsteady_ratio_takes_more_until_it_is_known() -> None:
    unsteady = itertools.chain([2.2, 2.5, 2.2], itertools.repeat(2.3))
    taken, _ = rounds_of(unsteady, itertools.repeat(1.0), 4)
    found = ratios(taken["single"], taken["astra"])
    assert 4 < len(found) < 4 * MOST
    assert known(found)
    assert not known(found[:-1])


def test_rounds_are_bounded_in_number_and_time() -> None:
    assert not known([2.0])
    taken, _ = rounds_of(itertools.cycle([1.0, 9.0]), itertools.repeat(1.0), 2)
    assert len(taken["single"]) == 2 * MOST
    taken, _ = rounds_of(itertools.cycle([1.0, 9.0]), itertools.repeat(1.0), 2, tick=30.0)
    assert len(taken["single"]) == len(taken["astra"]) == 2


@pytest.mark.parametrize(
    ("others", "processor", "threads", "disturbed"),
    [(0.0, 1.0, 1, False), (0.4, 1.0, 1, True), (0.0, 0.8, 1, True), (0.0, 1.6, 2, False)],
)
def test_contention_is_seen_in_either_way(
    others: float, processor: float, threads: int, disturbed: bool
) -> None:
    said = disturbance(Contention(others, 0.0), [Sample(1.0, processor)], threads)
    assert said["disturbed"] is disturbed
    assert ("80% of a core" in said["why"]) is (processor == 0.8)
