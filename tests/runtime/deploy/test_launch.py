"""`astra run` owns its workers: none outlives it, and it says which rank failed first.

Ctrl-C, SIGTERM and SIGKILL of the leader are in cli/test_run.py.
"""

from __future__ import annotations

import io
import os
import pty
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from astra_runtime.cli import main
from astra_runtime.deploy.jobs import Ranks
from astra_runtime.deploy.launch import READY, Workers
from tests.processes import Fork, runs, workers_of

from ..cli.commands import PROMPT, model_options
from ..ranks import wait_for


def test_a_closed_terminal_ends_leader_and_workers(
    home: Path,
    here: Callable[..., tuple[str, str]],  # workers are forks
) -> None:
    ours, theirs = pty.openpty()
    command = ["run", *model_options(home), "--prompt", PROMPT, "--world-size", "3"]

    def lead_the_terminal() -> int:
        os.close(ours)
        os.close(os.open(os.ttyname(theirs), os.O_RDWR))  # becomes the controlling terminal
        for stream in range(3):
            os.dup2(theirs, stream)
        return main(command)

    leader = Fork(lead_the_terminal)
    os.close(theirs)
    workers = wait_for(lambda: len(found := workers_of(leader.pid)) == 2 and found, 0.1)
    os.close(ours)  # the terminal is gone: SIGHUP to its foreground
    assert leader.wait() == 128 + signal.SIGHUP
    leader.stdout.close()
    wait_for(lambda: not any(map(runs, workers.values())), 0.1)


def struck(
    home: Path,
    here: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    blow: signal.Signals,
    world_size: int,
    *more: str,
) -> str:
    """The last words of a leader, this process, whose last worker meets `blow` as the job begins.

    It is the leader that strikes, once the ranks have compared their models: before, a wait has the
    start's longer timeout.
    """
    leader, struck_at = os.getpid(), list[int]()

    def engine(ranks: Ranks, *asked: Any) -> Any:
        made = real(ranks, *asked)
        if os.getpid() == leader and not struck_at:  # the workers are forks
            struck_at.append(workers_of(leader)[world_size - 1])
            os.kill(struck_at[0], blow)
        return made

    real = Ranks.engine
    monkeypatch.setattr(Ranks, "engine", engine)
    _, words = here(
        "run", *model_options(home), "--prompt", PROMPT, "--world-size", str(world_size),
        "--max-new-tokens", "200", *more, code=1,
    )  # fmt: skip
    assert struck_at
    assert not workers_of(leader)
    return words.strip().splitlines()[-1]


def test_the_worker_that_died_first_is_named(
    home: Path,
    here: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 2 is killed; rank 1, which then fails as well, is not to blame."""
    last = struck(home, here, monkeypatch, signal.SIGKILL, 3)
    assert last.startswith("astra: error: rank 2 was lost")
    assert "rank 2 was ended by SIGKILL" in last


def test_a_worker_that_stops_is_named_and_ended(
    home: Path,
    here: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = struck(home, here, monkeypatch, signal.SIGSTOP, 2, "--timeout", "2")
    assert "rank 1 sent nothing within" in last


class Ended:
    """A process that has ended, or that runs."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code


@pytest.mark.parametrize(
    ("codes", "named", "wanted"),
    [
        ({1: 1, 2: -9}, 2, "rank 2 was ended by SIGKILL"),
        ({1: 1, 2: -9}, None, "rank 1 ended with status 1"),
        ({1: 1, 2: None}, 2, None),  # it was late, and still runs: the error itself names it
        ({1: 0, 2: 1}, 0, "rank 2 ended with status 1"),
    ],
)
def test_last_words_are_those_of_the_rank_to_blame(
    codes: dict[int, int | None], named: int | None, wanted: str | None
) -> None:
    workers: Any = Workers(1, [], 1)
    workers.processes = {rank: Ended(code) for rank, code in codes.items()}
    workers.errors = {rank: io.StringIO() for rank in codes}
    assert workers.first_failed(named) == wanted


def test_a_worker_that_ends_before_it_is_ready_is_started_more_and_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, started = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    workers: Any = Workers(1, [], 1)

    def start(rank: int) -> None:
        started.append(clock[0])
        process: Any = Ended(1)
        ours, theirs = os.pipe()
        if len(started) == 4:
            os.write(theirs, READY.encode())
        os.close(theirs)
        process.stdout = open(ours)  # noqa: SIM115 - closed when it is started again
        workers.processes[rank], workers.errors[rank] = process, io.StringIO()

    workers._start = start
    start(1)
    for tick in range(1, 40):
        clock[0] = tick / 4
        workers.restart_ended()
    # at once after the first and after the one that was ready, else after 1 and 2 s
    assert started == [0.0, 0.25, 1.25, 3.25, 7.25, 7.5, 8.5]
    workers.processes[1].stdout.close()
