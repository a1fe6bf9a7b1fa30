"""kill -9 of any rank, in any block, before, within and after a frame: what the others are told.

A figure is the time from the signal to the error in a survivor's hands. Most of it is the kernel's,
until it closes the sockets of the process: `exit` is that part alone, `noticed` the rest. A process
with a large model must not take longer to be missed than one without (keeper.hpp).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest

from astra_runtime.control import Control
from tests.runtime.ranks import free_ports, key_folder

from .forks import Forks, Outcome
from .rank import BLOCKS
from .report import Row, percentile

MOMENTS = ("before", "mid", "after")
IN_TIME = 1.0  # seconds from the signal, for any survivor
LATE = 30.0  # the same where other tests run beside these: a wait has its deadline later
P99_MS = 50.0
COMMAND = "python -m pytest -m faults tests/faults/test_kill.py"
LARGE = 2 << 30  # bytes
OWNER = 0  # of an encoder's answer: it cannot be left out
# Parts so small that a frame of codes has five to ten; a deadline that only a hang would reach.
DATAGRAMS: dict[str, Any] = {
    "backend": "datagram",
    "fragment_size": 12,
    "on_missing": "degrade",
    "deadline_ms": 5000.0,
}


class Case(NamedTuple):
    world_size: int
    victim: int
    block: int
    moment: str
    encrypted: bool
    seed: int


Judge = Callable[[Case, Outcome, float], tuple[str | None, float]]


def cases(seed: int) -> Iterator[Case]:
    """Every block, moment and rank of worlds of 2, 3 and 4; half of them inside TLS."""
    draw = random.Random(seed)
    for world_size in (2, 3, 4):
        for victim in range(world_size):
            for block in range(BLOCKS):
                for moment in MOMENTS:
                    tls, number = draw.random() < 0.5, draw.randrange(1 << 30)
                    yield Case(world_size, victim, block, moment, tls, number)


def some_victims(seed: int) -> Iterator[Case]:
    """Of the same, one rank by chance for every block, moment and world."""
    draw = random.Random(seed)
    for world_size in (2, 3, 4):
        for block in range(BLOCKS):
            for moment in MOMENTS:
                victim, tls = draw.randrange(world_size), draw.random() < 0.5
                yield Case(world_size, victim, block, moment, tls, draw.randrange(1 << 30))


def run(
    forks: Forks,
    case: Case,
    signal: str,
    timeout: float,
    seconds: float,
    ballast: int = 0,
    **more: Any,
) -> list[Outcome]:
    """One case, its victim struck by `signal`; `more`: of `rank.rank`. `ballast`: the victim's."""
    peers = free_ports(case.world_size)
    options: dict[str, Any] = {"peers": peers, "timeout": timeout, **more}
    if case.encrypted:
        options["keys"] = str(key_folder())
    tasks = [("tests.faults.rank:rank", {**options, "number": n}) for n in range(case.world_size)]
    tasks[case.victim][1].update(
        {"fault": {**case._asdict(), "signal": signal}, "ballast": ballast}
    )
    stays = [case.victim] if signal == "SIGSTOP" else []
    return forks.run(tasks, seconds, stays)


def fault_of(
    case: Case, outcome: Outcome, struck: float, in_time: float = IN_TIME
) -> tuple[str | None, float]:
    """What is wrong with a survivor's end, and the milliseconds after which it knew."""
    told = outcome.told
    if outcome.status is None:
        return f"{case}: a survivor hangs", 1e3 * in_time
    if "error" not in told:
        return f"{case}: a survivor ended with {outcome}", 1e3 * in_time
    late = told["raised"] - max(struck, told["began"])
    # One that is a block behind the victim or before it may be the first to know; its cause is
    # everyone's. After the last block comes the answer.
    ahead = case.block + 1 if case.block + 1 < BLOCKS else Control.HEAD
    blocks = {case.block - 1, case.block, ahead, told["waited"]}
    right = told["error"] == "PeerLost" and told["rank"] == case.victim and told["block"] in blocks
    if right and late <= in_time:
        return None, 1e3 * late
    return f"{case}: {told['text']} after {1e3 * late:.1f} ms", 1e3 * late


def left_out(
    case: Case, outcome: Outcome, struck: float, in_time: float = IN_TIME
) -> tuple[str | None, float]:
    """The same over datagrams: who has killed the answer's owner gets an error, and who has killed
    anybody else an answer that says whom it lacks, in which blocks."""
    told = outcome.told
    if case.victim == OWNER:
        return fault_of(case, outcome, struck, in_time)
    if "answers" not in told or told["noticed"] is None:
        return f"{case}: no answer, or the loss was not noticed: {outcome}", 1e3 * in_time
    began, noticed = told["noticed"]
    late = noticed - max(struck, began)
    (answer,) = told["answers"]
    missing = set(answer["missing"].get(str(case.victim), []))
    sure = set(range(case.block + (case.moment != "before"), BLOCKS + 1))
    named = told["lost"] == {str(case.victim): "PeerLost"}
    alone = set(answer["missing"]) == {str(case.victim)}
    if named and alone and sure <= missing <= sure | {case.block} and late <= in_time:
        return None, 1e3 * late
    return f"{case}: after {1e3 * late:.1f} ms {told}", 1e3 * late


def try_kill(forks: Forks, case: Case, row: Row, judge: Judge = fault_of, **more: Any) -> None:
    outcomes = run(forks, case, "SIGKILL", timeout=2 * LATE, seconds=2 * LATE, **more)
    victim = outcomes[case.victim]
    struck = victim.told.get("struck")
    if struck is None or victim.gone is None or victim.status != -9:
        row.count(f"{case}: the victim was not killed: {victim}")
        return
    row.extra.setdefault("exit_ms", []).append(1e3 * (victim.gone - struck))
    for number, outcome in enumerate(outcomes):
        if number == case.victim:
            continue
        row.count(*judge(case, outcome, struck))
        began, noticed = outcome.told.get("noticed") or (
            outcome.told.get("began", 0.0),
            outcome.told.get("raised", 0.0),
        )
        late = noticed - max(victim.gone, began)
        row.extra.setdefault("noticed_ms", []).append(max(0.0, 1e3 * late))


def sum_up(row: Row) -> None:
    """Percentiles in place of the times of single cases."""
    parts = {name: row.extra.pop(f"{name}_ms") for name in ("exit", "noticed")}
    row.extra["runs"] = len(parts["exit"])
    for name, values in parts.items():
        row.extra |= {f"{name}_p{n}_ms": percentile(values, n / 100) for n in (50, 99)}


def test_some_kills(forks: Forks) -> None:
    row = Row("kill", COMMAND, seed=1)
    for case in random.Random(1).sample(list(cases(1)), 6):
        try_kill(forks, case, row, partial(fault_of, in_time=LATE))
    row.check()


def test_some_kills_over_datagrams(forks: Forks) -> None:
    row = Row("kill_datagram", COMMAND, seed=1)
    options = DATAGRAMS | {"deadline_ms": 1e3 * LATE}
    for case in random.Random(1).sample(list(some_victims(1)), 6):
        try_kill(forks, case, row, partial(left_out, in_time=LATE), **options)
    row.check()


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_kill(forks: Forks, record: Callable[[Row], None]) -> None:
    row = Row("kill", COMMAND, seed=0)
    for case in cases(0):
        try_kill(forks, case, row)
    sum_up(row)
    record(row)
    row.check()
    assert row.extra["noticed_p99_ms"] <= P99_MS


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_kill_of_a_large_process(forks: Forks, record: Callable[[Row], None]) -> None:
    row = Row("kill_large", COMMAND, seed=0)
    for case in random.Random(0).sample(list(some_victims(0)), 36):
        try_kill(forks, case, row, ballast=LARGE)
    sum_up(row)
    record(row)
    row.check()
    assert row.extra["exit_p99_ms"] <= P99_MS


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_kill_over_datagrams(forks: Forks, record: Callable[[Row], None]) -> None:
    row = Row("kill_datagram", COMMAND, seed=0)
    for case in some_victims(0):
        try_kill(forks, case, row, left_out, **DATAGRAMS)
    sum_up(row)
    record(row)
    row.check()
    assert row.extra["noticed_p99_ms"] <= P99_MS
