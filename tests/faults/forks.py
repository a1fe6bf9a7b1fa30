"""Ranks as processes that start in milliseconds: a server imports torch once and forks.

    with Forks() as forks:
        outcomes = forks.run([("tests.faults.kill:rank", {...}), ...], seconds=20)

Each task is a function that gets a `Told` and keyword arguments, in a process of its own. What it
tells reaches the caller even when the process is killed the next moment.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

ROOT = Path(__file__).resolve().parents[2]
Task = tuple[str, dict[str, Any]]
MEETINGS = 3  # how often the processes of a case can wait for one another


@dataclass
class Outcome:
    """How one process ended.

    status: as `os.waitstatus_to_exitcode`; None: it had to be ended.
    gone: when the kernel closed its files (`time.monotonic`), a while after it was killed.
    """

    told: dict[str, Any] = field(default_factory=dict)
    status: int | None = None
    gone: float | None = None


class Told:
    """What a process tells its caller, one fact a call, and where it waits for the others.

    A meeting is a pipe that nobody writes to: it ends when each process has closed its end, or has
    ended. There are `MEETINGS` of them.
    """

    def __init__(self, fd: int, meetings: Sequence[tuple[int, int]]) -> None:
        self._fd = fd
        self._waits, self._holds = ([pipe[end] for pipe in meetings] for end in (0, 1))
        self._arrived: set[int] = set()

    def __call__(self, **facts: Any) -> None:
        os.write(self._fd, json.dumps(facts).encode() + b"\n")

    def arrive(self, meeting: int = 0) -> None:
        """The others need not wait for this process there."""
        if meeting not in self._arrived:
            self._arrived.add(meeting)
            os.close(self._holds[meeting])

    def meet(self, meeting: int = 0) -> None:
        """Waits until every process of the case has arrived there, or has ended."""
        self.arrive(meeting)
        os.read(self._waits[meeting], 1)


class Forks:
    """The caller's side: a server process, and one case after the other in its children.

    prepare: functions that the server calls before it forks, as "module:function".
    """

    def __init__(self, prepare: Sequence[str] = ()) -> None:
        path = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks", *prepare],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self._ask: IO[str] = self._pipe(self._server.stdin)
        self._hear: IO[str] = self._pipe(self._server.stdout)

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def run(
        self, tasks: Sequence[Task], seconds: float, stays: Sequence[int] = ()
    ) -> list[Outcome]:
        """Runs the tasks at the same time; those still running after `seconds` are killed.

        stays: tasks that are not waited for, since they are stopped or never end.
        """
        case = {"tasks": list(tasks), "seconds": seconds, "stays": list(stays)}
        self._ask.write(json.dumps(case) + "\n")
        self._ask.flush()
        answer = self._hear.readline()
        assert answer, "the server of forks has ended"
        return [Outcome(**outcome) for outcome in json.loads(answer)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ask.close()
        self._hear.close()
        self._server.wait(30)


def _function(name: str) -> Callable[..., None]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def _child(task: Task, told: Told) -> None:
    """A forked process: runs its task and never returns to the server's loop."""
    status = 1
    try:
        name, options = task
        _function(name)(told, **options)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _fork(task: Task, meetings: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The child's process id, and the pipe that it tells through."""
    mine, its = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(mine)
        _child(task, Told(its, meetings))
    os.close(its)
    return child, mine


class _Children:
    """The processes of one case, and the pipes that they tell through."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        meetings = [os.pipe() for _ in range(MEETINGS)]
        forked = [_fork(task, meetings) for task in tasks]
        for end in (end for pipe in meetings for end in pipe):
            os.close(end)
        self.pids = [pid for pid, _ in forked]
        self.number = {fd: number for number, (_, fd) in enumerate(forked)}
        self.data = [b""] * len(forked)
        self.gone: list[float | None] = [None] * len(forked)

    def hear(self, seconds: float, stays: Sequence[int]) -> None:
        """Reads until every pipe is closed, which the kernel does as it ends a process."""
        deadline = time.monotonic() + seconds
        open_pipes = set(self.number)
        while any(self.number[fd] not in stays for fd in open_pipes):
            left = deadline - time.monotonic()
            ready = select.select(open_pipes, [], [], max(0.0, left))[0]
            for fd in ready:
                self.data[self.number[fd]] += (part := os.read(fd, 65536))
                if not part:
                    self.gone[self.number[fd]] = time.monotonic()
                    open_pipes.remove(fd)
            if left <= 0:
                return

    def outcomes(self) -> list[dict[str, Any]]:
        """Ends what still runs."""
        found = []
        for fd, number in self.number.items():
            pid, data, gone = self.pids[number], self.data[number], self.gone[number]
            if gone is None:
                os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            told: dict[str, Any] = {}
            for line in data.decode().splitlines():
                told |= json.loads(line)
            found.append({"told": told, "status": None if gone is None else status, "gone": gone})
            os.close(fd)
        return found


def serve(prepare: Sequence[str]) -> None:
    """Answers each line, a case, with a line: the outcomes of its tasks."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a task prints is no answer
    for name in prepare:
        _function(name)()
    for line in sys.stdin:
        case = json.loads(line)
        children = _Children(case["tasks"])
        children.hear(case["seconds"], case["stays"])
        answers.write(json.dumps(children.outcomes()) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1:])
