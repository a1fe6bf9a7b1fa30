"""Ranks and networks that stop without a word: the deadline says so, ±10 %.

A stopped process answers keepalives, and a relay that has stopped relaying acknowledges what it
gets: only a deadline on the wait sees either.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from astra_runtime.control import is_control
from tests.runtime.ranks import free_ports, key_folder

from .forks import Forks, Outcome
from .rank import BLOCKS
from .report import Row
from .test_kill import MOMENTS, Case, run

DEADLINE = 1.0  # seconds
QUICK = 0.3  # the same where other work makes any rank slow, and only the victim's wait ends
AMPLE = 60.0  # seconds, which no wait takes that does not hang
TOLERANCE = 0.10
COMMAND = "python -m pytest -m faults tests/faults/test_stalls.py"
RELAYED = ("blackhole", "half_open", "slow")


def fault_of(
    case: Any, outcome: Outcome, victim: int, alone: bool = True
) -> tuple[str | None, float]:
    """What is wrong with a survivor's end, and how many milliseconds its last wait took.

    alone: whether nothing else makes this machine slow.
    """
    told = outcome.told
    if outcome.status is None or "error" not in told:
        return f"{case}: no error but {outcome}", 0.0
    waited, deadline = told["ended"] - told["began"], DEADLINE
    if is_control(told["waited"]):
        deadline *= 2  # the answer may come from a rank that has waited for another one before
    right = (told["error"], told["rank"]) == ("DeadlineExceeded", victim)
    if right and (not alone or abs(waited - deadline) <= TOLERANCE * deadline):
        return None, 1e3 * waited * DEADLINE / deadline
    return f"{case}: {told['text']} after {waited:.3f} s", 1e3 * waited


def stops(seed: int, count: int) -> list[Case]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        world_size = 2 + number % 3
        victim, block = draw.randrange(world_size), draw.randrange(BLOCKS)
        tls = draw.random() < 0.5
        found.append(Case(world_size, victim, block, draw.choice(MOMENTS), tls, number))
    return found


def waits(block: int, moment: str, alone: bool) -> dict[str, Any]:
    """How long ranks wait: for the victim alone, where other work makes any of them slow."""
    if alone:
        return {"timeout": DEADLINE}
    return {"timeout": AMPLE, "patience": (block + (moment == "after"), QUICK)}


def try_stop(forks: Forks, case: Case, row: Row, alone: bool = True) -> None:
    patience = waits(case.block, case.moment, alone)
    outcomes = run(forks, case, "SIGSTOP", seconds=AMPLE, **patience)
    if "struck" not in outcomes[case.victim].told:
        row.count(f"{case}: the victim was not stopped: {outcomes[case.victim]}")
        return
    for number, outcome in enumerate(outcomes):
        if number != case.victim:
            row.count(*fault_of(case, outcome, case.victim, alone))


def try_relay(
    forks: Forks, mode: str, victim: int, block: int, tls: bool, row: Row, alone: bool
) -> None:
    """Two ranks with a relay in between, which changes its mind just before a block's frame."""
    first, second, between, control = free_ports(4)
    side = "dialer" if victim == 0 else "acceptor"
    options = waits(block, "before", alone) | {"keys": str(key_folder()) if tls else None}
    ranks = [
        {**options, "number": 0, "peers": [first, second]},
        {**options, "number": 1, "peers": [between, second]},
    ]
    ranks[victim]["fault"] = {"block": block, "moment": "before", "relay": control}
    if mode == "half_open":
        ranks[victim]["fault"]["signal"] = "SIGKILL"
    network = {"at": between, "target": first, "control": control, "mode": mode, "towards": side}
    tasks = [("tests.faults.rank:rank", rank) for rank in ranks]
    tasks.append(("tests.faults.relay:relay", network))
    outcomes = forks.run(tasks, seconds=AMPLE, stays=[2, victim] if mode == "slow" else [2])
    case = (mode, f"rank {victim}", f"block {block}", "TLS" if tls else "plaintext")
    if "switched" not in outcomes[2].told:
        row.count(f"{case}: the relay went on: {outcomes}")
        return
    row.count(*fault_of(case, outcomes[1 - victim], victim, alone))


def relays(forks: Forks, mode: str, count: int, seed: int, alone: bool = True) -> Row:
    row, draw = Row(mode, COMMAND, seed), random.Random(seed)
    for number in range(count):
        block, tls = draw.randrange(BLOCKS), number % 4 >= 2
        try_relay(forks, mode, number % 2, block, tls, row, alone)
    row.extra["deadline_ms"] = 1e3 * DEADLINE
    return row


def test_a_stopped_rank(forks: Forks) -> None:
    row = Row("stop", COMMAND, 1)
    for case in stops(1, 2):
        try_stop(forks, case, row, alone=False)
    row.check()
    # a survivor may have heard of it from another one, which began to wait before it
    assert max(row.ms) >= 1e3 * (1 - TOLERANCE) * QUICK


@pytest.mark.parametrize("mode", RELAYED)
def test_a_silent_network(forks: Forks, mode: str) -> None:
    row = relays(forks, mode, 1, 1, alone=False)
    row.check()
    assert max(row.ms) >= 1e3 * (1 - TOLERANCE) * QUICK


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_stop(forks: Forks, record: Callable[[Row], None]) -> None:
    row = Row("stop", COMMAND, 0, extra={"deadline_ms": 1e3 * DEADLINE})
    for case in stops(0, 30):
        try_stop(forks, case, row)
    record(row)
    row.check()


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", RELAYED)
def test_relays(forks: Forks, record: Callable[[Row], None], mode: str) -> None:
    row = relays(forks, mode, 12, 0)
    record(row)
    row.check()
