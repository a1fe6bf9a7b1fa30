"""Processes that start at once: forks of this one, which has imported torch and transformers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from astra_runtime.cli import main
from astra_runtime.deploy import launch


class Fork:
    """A function in a fork of this process, with what `launch.Workers` needs of a `Popen`."""

    def __init__(self, work: Callable[[], int | None], stderr: IO[str] | None = None) -> None:
        self.returncode: int | None = None
        ours, theirs = os.pipe()
        with warnings.catch_warnings():  # of threads in this process, which are idle
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            self._become(work, theirs, stderr)
        os.close(theirs)
        self.stdout: IO[str] = open(ours)  # noqa: SIM115 - closed by whoever waits

    @staticmethod
    def _become(work: Callable[[], int | None], out: int, stderr: IO[str] | None) -> None:
        status = 1
        try:
            os.setsid()
            os.dup2(out, 1)
            if stderr is not None:
                os.dup2(stderr.fileno(), 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            status = work() or 0
            sys.stdout.flush()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Ends it, whatever it does."""
        self.kill()
        self.wait()
        self.stdout.close()

    def end(self) -> str:
        """What it printed; fails unless it ended well."""
        with self.stdout:
            printed = self.stdout.read()
        assert self.wait() == 0
        return printed


def started(command: list[str], stderr: IO[str] | None = None, **_: Any) -> Fork:
    """In place of `subprocess.Popen`, for the workers that `astra` starts."""
    arguments = command[command.index("worker") :]
    rank = arguments[arguments.index("--rank") + 1]

    def work() -> int:
        Path("/proc/self/comm").write_text(f"rank-{rank}")
        return main(arguments)

    return Fork(work, stderr)


def fork_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `astra` fork its workers off this process for the rest of a test."""
    processes = SimpleNamespace(**vars(subprocess) | {"Popen": started})
    processes.Popen.terminate, processes.Popen.kill = Fork.terminate, Fork.kill
    monkeypatch.setattr(launch, "subprocess", processes)


def status(process: int | str) -> list[str]:
    """What the kernel says of a process, from its state on; nothing if it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def runs(process: int) -> bool:
    return status(process)[:1] not in ([], ["Z"])


def workers_of(leader: int) -> dict[int, int]:
    """The process of each rank that this leader started, as `started` names them."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and status(entry.name)[1:2] == [str(leader)]:
            with contextlib.suppress(OSError):  # it has ended
                name = (entry / "comm").read_text().strip()
                if name.startswith("rank-"):
                    found[int(name.removeprefix("rank-"))] = int(entry.name)
    return found
