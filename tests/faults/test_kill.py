"""kill -9 of any rank, in any block, before, within and after a frame: what the others are told.

A figure is the time from the signal to the error in a survivor's hands. Most of it is the kernel's,
which takes a process's memory apart before it closes its sockets: `exit` is that part alone,
`noticed` the rest, for which ASTRA is answerable. On a busy machine the first grows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from tests.runtime.ranks import free_ports, key_folder

from .forks import Forks, Outcome
from .rank import BLOCKS
from .report import Row, percentile

MOMENTS = ("before", "mid", "after")
IN_TIME = 1.0  # seconds from the signal, for any survivor on however busy a machine
P99_MS = 50.0
COMMAND = "python -m pytest -m faults tests/faults/test_kill.py"


class Case(NamedTuple):
    world_size: int
    victim: int
    block: int
    moment: str
    encrypted: bool
    seed: int


def cases(seed: int) -> Iterator[Case]:
    """Every block, moment and rank of worlds of 2, 3 and 4; half of them inside TLS."""
    draw = random.Random(seed)
    for world_size in (2, 3, 4):
        for victim in range(world_size):
            for block in range(BLOCKS):
                for moment in MOMENTS:
                    tls, number = draw.random() < 0.5, draw.randrange(1 << 30)
                    yield Case(world_size, victim, block, moment, tls, number)


def run(forks: Forks, case: Case, signal: str, timeout: float, seconds: float) -> list[Outcome]:
    peers = free_ports(case.world_size)
    options: dict[str, Any] = {"peers": peers, "timeout": timeout}
    if case.encrypted:
        options["keys"] = str(key_folder())
    tasks = [("tests.faults.rank:rank", {**options, "number": n}) for n in range(case.world_size)]
    tasks[case.victim][1]["fault"] = {**case._asdict(), "signal": signal}
    stays = [case.victim] if signal == "SIGSTOP" else []
    return forks.run(tasks, seconds, stays)


def fault_of(case: Case, outcome: Outcome, struck: float) -> tuple[str | None, float]:
    """What is wrong with a survivor's end, and the milliseconds after which it knew."""
    told = outcome.told
    if outcome.status is None:
        return f"{case}: a survivor hangs", 1e3 * IN_TIME
    if "error" not in told:
        return f"{case}: a survivor ended with {outcome}", 1e3 * IN_TIME
    late = told["raised"] - max(struck, told["began"])
    blocks = {case.block, case.block + 1, told["waited"]}
    right = told["error"] == "PeerLost" and told["rank"] == case.victim and told["block"] in blocks
    if right and late <= IN_TIME:
        return None, 1e3 * late
    return f"{case}: {told['text']} after {1e3 * late:.1f} ms", 1e3 * late


def try_kill(forks: Forks, case: Case, row: Row) -> None:
    outcomes = run(forks, case, "SIGKILL", timeout=20.0, seconds=20.0)
    victim = outcomes[case.victim]
    struck = victim.told.get("struck")
    if struck is None or victim.gone is None or victim.status != -9:
        row.count(f"{case}: the victim was not killed: {victim}")
        return
    row.extra.setdefault("exit_ms", []).append(1e3 * (victim.gone - struck))
    for number, outcome in enumerate(outcomes):
        if number == case.victim:
            continue
        row.count(*fault_of(case, outcome, struck))
        late = outcome.told.get("raised", 0.0) - max(victim.gone, outcome.told.get("began", 0.0))
        row.extra.setdefault("noticed_ms", []).append(max(0.0, 1e3 * late))


def test_some_kills(forks: Forks) -> None:
    row = Row("kill", COMMAND, seed=1)
    for case in random.Random(1).sample(list(cases(1)), 6):
        try_kill(forks, case, row)
    row.check()


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_kill(forks: Forks, record: Callable[[Row], None]) -> None:
    row = Row("kill", COMMAND, seed=0)
    for case in cases(0):
        try_kill(forks, case, row)
    parts = {name: row.extra.pop(f"{name}_ms") for name in ("exit", "noticed")}
    row.extra["runs"] = len(parts["exit"])
    for name, values in parts.items():
        row.extra |= {f"{name}_p{n}_ms": percentile(values, n / 100) for n in (50, 99)}
    record(row)
    row.check()
    assert row.extra["noticed_p99_ms"] <= P99_MS
