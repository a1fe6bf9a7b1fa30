"""Methods that are timed in turns, until the ratio of their times is known."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..contention import Contention

KNOWN = 0.02  # standard error of the mean ratio over the ratio
MOST = 3  # times as many rounds as were asked for
EXTRA_SECONDS = 25.0  # since the first round began, beyond which none is added
STARVED = 0.95  # processor seconds a second below which one thread had no core to itself


class Sample(NamedTuple):
    """One run: seconds, and processor seconds of the busiest process."""

    seconds: float
    processor: float


def sample_of(prefill: Mapping[str, Any]) -> Sample:
    """What `Ranks.prefill` found in a single run."""
    return Sample(prefill["seconds"][0], max(prefill["processor_seconds"][0]))


def ratios(baseline: Sequence[Sample], samples: Sequence[Sample]) -> list[float]:
    """How many times as long the baseline took, round by round."""
    pairs = zip(baseline, samples, strict=True)
    return [theirs.seconds / ours.seconds for theirs, ours in pairs]


def known(found: Sequence[float]) -> bool:
    """Whether the mean of these ratios is known to `KNOWN`; of one alone it is not."""
    if len(found) < 2:
        return False
    error = statistics.stdev(found) / math.sqrt(len(found))
    return error <= KNOWN * statistics.fmean(found)


def in_turns(
    methods: Mapping[str, Callable[[], Sample]],
    rounds: int,
    of_ratio: tuple[str, str],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[Sample]]:
    """Runs every method once a round, in an order that is turned round each time.

    There are at least `rounds`. Until the ratio of the two methods `of_ratio` is known there are
    more, up to `MOST` times as many and for up to `EXTRA_SECONDS` in all.
    """
    taken: dict[str, list[Sample]] = {name: [] for name in methods}
    begun = clock()
    for number in range(MOST * rounds):
        late = clock() - begun > EXTRA_SECONDS
        if number >= rounds and (late or known(ratios(*(taken[name] for name in of_ratio)))):
            break
        for name in list(methods)[:: -1 if number % 2 else 1]:
            taken[name].append(methods[name]())
    return taken


def disturbance(contention: Contention, single: Sequence[Sample], threads: int) -> dict[str, Any]:
    """What else the machine did meanwhile, as JSON has it.

    `processor_over_seconds` is of the single device, a thread; where it has one, that is 1 on an
    idle machine. More threads wait for each other, so there it says nothing.
    """
    share = statistics.median(run.processor / run.seconds for run in single) / threads
    starved = threads == 1 and share < STARVED
    why = str(contention) + (f"; the single device had {share:.0%} of a core" if starved else "")
    return {
        "others": contention.others,
        "steal": contention.steal,
        "processor_over_seconds": share,
        "disturbed": contention.disturbs or starved,
        "why": why,
    }
