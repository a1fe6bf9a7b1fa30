"""A rank that comes too late is left out, the answer says so, and the next one is whole again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.runtime.ranks import free_ports, key_folder

from .forks import Forks
from .rank import BLOCKS
from .report import Row

COMMAND = "python -m pytest -m faults tests/faults/test_degraded.py"
WORLD = 3
CALLS = 3
DEADLINE = 0.3  # seconds, of a block; more where a call takes as long
LATER = 0.5  # seconds, after the deadline
AMPLE = 60.0  # seconds, which no call takes


class Case(NamedTuple):
    victim: int
    block: int
    encrypted: bool


def cases(seed: int, count: int) -> list[Case]:
    """Never rank 0: it owns an encoder's answer, and cannot be left out."""
    draw = random.Random(seed)
    return [
        Case(draw.randrange(1, WORLD), draw.randrange(BLOCKS), draw.random() < 0.5)
        for _ in range(count)
    ]


class Pace(NamedTuple):
    """How quick this machine is, in milliseconds: what a call takes that lacks nothing now, and the
    least that is allowed for."""

    call_ms: float
    least_ms: float

    @property
    def deadline_ms(self) -> float:
        return max(self.least_ms, 2 * self.call_ms)

    @property
    def slack_ms(self) -> float:
        """For a call, beside its deadlines."""
        return max(3.3 * self.least_ms, 10 * self.call_ms)


def run(
    forks: Forks,
    case: Case,
    deadline_ms: float,
    *,
    sleep: float = 0.0,
    patience: float | None = None,
) -> list[dict[str, Any]]:
    """What the ranks tell. The victim sends a block late: by `sleep` seconds, or when the others,
    who wait for `patience` seconds, have given that block up."""
    options: dict[str, Any] = {"peers": free_ports(WORLD), "calls": CALLS}
    options |= {"on_missing": "degrade", "deadline_ms": deadline_ms}
    options["keys"] = str(key_folder()) if case.encrypted else None
    tasks = [("tests.faults.rank:rank", {**options, "number": n}) for n in range(WORLD)]
    fault: dict[str, Any] = {"block": case.block, "moment": "before"}
    if sleep:
        tasks[case.victim][1]["fault"] = fault | {"sleep": sleep}
    if patience is not None:
        for number, (_, rank) in enumerate(tasks):
            late = number == case.victim
            rank |= {"fault": fault | {"late": True}} if late else {}
            rank |= {} if late else {"patience": (case.block, patience)}
    return [outcome.told for outcome in forks.run(tasks, seconds=60.0)]


def fault_of(case: Case, told: dict[str, Any], whole: str, pace: Pace) -> tuple[str | None, float]:
    """What is wrong with the answers of a rank that went on, and the time its first one took.

    `whole`: the digest of an answer that lacks nothing, as the last one has to be again.
    """
    if "answers" not in told:
        return f"{case}: no answer but {told}", 0.0
    first, *_, last = told["answers"]
    fault = None
    if case.block not in first["missing"].get(str(case.victim), []):
        fault = f"who was left out is not told: {first}"
    elif last["degraded"]:
        fault = f"the victim is not back: {last}"
    for answer in told["answers"]:
        deadlines = sum(map(len, answer["missing"].values()))
        if answer["degraded"] != bool(answer["missing"]):
            fault = f"the flag contradicts what is missing: {answer}"
        elif answer["degraded"] == (answer["digest"] == whole):
            fault = f"the flag contradicts the answer: {answer}"
        elif answer["ms"] > pace.deadline_ms * deadlines + pace.slack_ms:
            fault = f"took too long for {deadlines} deadlines: {answer}"
    return fault and f"{case}: {fault}", first["ms"]


def try_degraded(
    forks: Forks, count: int, seed: int, deadline: float = DEADLINE, alone: bool = True
) -> Row:
    """alone: whether nothing else makes this machine slow."""
    undisturbed = run(forks, Case(1, 0, False), 1e3 * AMPLE)
    answers = [answer for told in undisturbed for answer in told["answers"]]
    (whole,) = {answer["digest"] for answer in answers}
    pace = Pace(max(answer["ms"] for answer in answers), 1e3 * deadline)
    row = Row("degraded", COMMAND, seed, extra={"deadline_ms": pace.deadline_ms})
    for case in cases(seed, count):
        late = {"sleep": 1e-3 * pace.deadline_ms + LATER} if alone else {"patience": DEADLINE}
        told = run(forks, case, pace.deadline_ms, **late)
        for number in range(WORLD):
            if number != case.victim:
                row.count(*fault_of(case, told[number], whole, pace))
    return row


def test_a_degraded_answer(forks: Forks) -> None:
    try_degraded(forks, 2, 1, AMPLE, alone=False).check()


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_degraded(forks: Forks, record: Callable[[Row], None]) -> None:
    row = try_degraded(forks, 30, 0)
    record(row)
    row.check()
