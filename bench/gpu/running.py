"""Stages as processes with time limits: one that fails or is late does not stop the others."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.tree import ROOT

SECONDS = "{seconds}"  # in a command: how long it may go on, so that it ends by itself
ENDING = 20  # seconds before the limit at which such a command starts nothing new
GRACE = 4.0  # seconds between an interrupt and the end
LAST_LINES = 25
KEEP_EVERY = 2.0  # seconds


@dataclass(frozen=True)
class Stage:
    """Commands that run side by side.

    Attributes:
        seconds: its limit.
        least: what earlier stages must leave it.
        env: added to the environment.
        missing: why it cannot run here.
        note: what a failure may mean other than a fault of ours.
        spare: it takes what time is left, and being late is no failure.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    least: float = 0.0
    env: tuple[tuple[str, str], ...] = ()
    missing: str | None = None
    note: str | None = None
    spare: bool = False

    @property
    def shown(self) -> str:
        more = f"   (and {len(self.commands) - 1} more)" if len(self.commands) > 1 else ""
        return " ".join(" ".join(self.commands[0]).split()) + more


@dataclass(frozen=True)
class Result:
    """result: passed, failed, timed out or skipped."""

    stage: str
    result: str
    seconds: float
    status: int | None
    command: str
    last_lines: tuple[str, ...]
    counts: Mapping[str, int]
    wrong: tuple[str, ...] = ()
    note: str | None = None


class Running:
    """The processes of a stage. `outputs` are files that they write while they run."""

    def __init__(self, stage: Stage, limit: float, env: Mapping[str, str], logs: Path) -> None:
        self.stage, self.limit, self.began = stage, limit, time.monotonic()
        self.outputs = [logs / f"{stage.name}.{part}" for part in range(len(stage.commands))]
        self.late = False
        seconds = str(max(1.0, limit - ENDING))
        self.processes = []
        for words, path in zip(stage.commands, self.outputs, strict=True):
            with path.open("wb") as output:
                process = subprocess.Popen(
                    [seconds if word == SECONDS else word for word in words],
                    cwd=ROOT,
                    env={**env, **dict(stage.env)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(process)

    def done(self) -> bool:
        """Whether it has ended; past its limit it is ended."""
        left = [process for process in self.processes if process.poll() is None]
        if left and time.monotonic() - self.began > self.limit:
            self.late = True
            stop(left)
            return True
        return not left

    def result(self) -> Result:
        seconds = time.monotonic() - self.began
        codes = [-9 if p.returncode is None else p.returncode for p in self.processes]
        status = max(codes, key=abs)
        text = "\n".join(path.read_text(errors="replace") for path in self.outputs)
        result = "timed out" if self.late else "passed" if status == 0 else "failed"
        lines = tuple(line[:300] for line in text.strip().splitlines()[-LAST_LINES:])
        wrong = tuple(line[:300] for line in text.splitlines() if line.startswith("WRONG"))
        note = self.stage.note if result == "failed" else None
        return Result(
            *(self.stage.name, result, round(seconds, 1), status, self.stage.shown, lines),
            *(counts(text), wrong, note),
        )


def skipped(stage: Stage, why: str) -> Result:
    return Result(stage.name, "skipped", 0.0, None, stage.shown, (why,), {})


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends processes and their children; an interrupt first, on which pytest says what it has."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + GRACE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10.0)


def run_group(
    stages: Sequence[tuple[Stage, float]],
    env: Mapping[str, str],
    logs: Path,
    keep: Callable[[], None],
) -> list[Result]:
    """Runs stages side by side, each with its limit in seconds, and calls `keep` meanwhile."""
    running = [Running(stage, limit, env, logs) for stage, limit in stages]
    results: dict[str, Result] = {}
    last = time.monotonic()
    while len(results) < len(running):
        for one in running:
            if one.stage.name not in results and one.done():
                results[one.stage.name] = one.result()
        if time.monotonic() - last > KEEP_EVERY:
            keep()
            last = time.monotonic()
        time.sleep(0.05)
    return [results[one.stage.name] for one in running]


def counts(text: str) -> dict[str, int]:
    """What pytest says it passed, failed and skipped; of a run that was ended, so far."""
    words = r"(passed|failed|skipped|errors?)"
    summaries = re.findall(rf"^=* ?(\d+ {words}.* in [\d.]+m?s.*)$", text, flags=re.M)
    summaries += re.findall(rf"^(\d+ {words}[^\n]* in [\d.]+s)", text, flags=re.M)
    if summaries:
        pairs = re.findall(rf"(\d+) {words}", summaries[-1][0])
        return {word: int(number) for number, word in pairs}
    so_far: dict[str, int] = {}
    # with workers the outcome stands before the test's name, else behind it
    for before, behind in re.findall(
        r"^(?:\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|SKIPPED|ERROR) |\S+::.* "
        r"(PASSED|FAILED|SKIPPED|ERROR)\b)",
        text,
        flags=re.M,
    ):
        word = (before or behind).lower()
        so_far[word] = so_far.get(word, 0) + 1
    return so_far
