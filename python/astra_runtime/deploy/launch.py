"""Worker processes on this machine: started together, ended together, no orphans."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from ..console import say
from ..errors import AstraError

READY = "ready"
FAILURE = "astra: error: "
RESTART_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds; each is twice the one before
PASSED_ON = 40  # lines of what a worker wrote before it ended without giving a reason
# `-P`: the working folder is no place to import from; the first argument is where to import from.
_CHILD = """import sys
sys.path[:] = sys.argv.pop(1).split("\\n")
from astra_runtime.cli import main
sys.exit(main())"""
_PR_SET_PDEATHSIG = 1


class WorkerFailed(AstraError):
    """A worker process ended before its work was done."""


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens at just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def die_with(parent: int) -> None:
    """Has the kernel kill this process when `parent`, which started it, ends in whatever way."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def import_path() -> list[str]:
    """Where a child process finds what this one imports, and nothing of the working folder.

    Python puts that folder first for `python -m` and interactive use; a file of somebody's own
    there, called random.py for example, must not become a module of the workers. It stays where
    PYTHONPATH names it, and behind everything else where these packages themselves are in it.
    """
    working = os.path.realpath(os.getcwd())
    named = {os.path.realpath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p}
    path = [
        os.path.abspath(entry)
        for entry in sys.path
        if os.path.realpath(entry or working) != working or working in named
    ]
    kernels = importlib.util.find_spec("astra_kernels")  # found, not imported: it needs torch
    packages = [
        Path(__file__).parents[1],
        *(kernels.submodule_search_locations or () if kernels else ()),
    ]
    for root in (os.path.realpath(Path(package).parent) for package in packages):
        if root not in map(os.path.realpath, path):
            path.append(root)
    return path


def _ending(code: int | None) -> str:
    if code is None:
        return "still runs"
    if code >= 0:
        return f"ended with status {code}"
    return f"was ended by {signal.Signals(-code).name}"


class Workers:
    """Ranks 1 to N−1 as `astra worker` processes; leaving the `with` block ends them."""

    def __init__(self, world_size: int, arguments: Sequence[str], threads: int) -> None:
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.errors: dict[int, IO[str]] = {}
        self.loading = list(range(1, world_size))  # ranks that are not ready yet
        self._ready: set[int] = set()  # ranks whose first process was
        self._pauses: dict[int, float] = {}  # seconds, before each is started again
        self._not_before: dict[int, float] = {}
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._command = [sys.executable, "-P", "-c", _CHILD, "\n".join(import_path()), "worker"]
        self._arguments = list(arguments)
        for rank in range(1, world_size):
            self._start(rank)

    def _start(self, rank: int) -> None:
        # seekable, so that it can be read after the end
        self.errors[rank] = tempfile.TemporaryFile(  # noqa: SIM115 - closed by stop
            "w+", encoding="utf-8", errors="replace"
        )
        place = ["--rank", str(rank), "--parent", str(os.getpid())]
        self.processes[rank] = subprocess.Popen(
            [*self._command, *place, *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors[rank],
            text=True,
            env=self._environment,
            start_new_session=True,  # Ctrl-C reaches the leader alone, which ends the others
        )

    def restart_ended(self) -> list[str]:
        """Starts those that have ended once more; how they ended.

        One that ends before it is ready, again and again, is started more and more rarely.
        """
        reports, now = [], time.monotonic()
        for rank, process in list(self.processes.items()):
            if process.poll() is None or now < self._not_before.get(rank, -math.inf):
                continue
            reports.append(self.exit_report(rank))
            longer = min(max(2 * self._pauses.get(rank, 0.0), RESTART_PAUSE), LONGEST_PAUSE)
            self._pauses[rank] = 0.0 if self._was_ready(rank) else longer
            self._not_before[rank] = now + self._pauses[rank]
            if process.stdout is not None:
                process.stdout.close()
            self.errors[rank].close()
            self._start(rank)
        return reports

    def _was_ready(self, rank: int) -> bool:
        """Whether the process of `rank`, which has ended, had its model."""
        first, self._ready = rank in self._ready, self._ready - {rank}
        stdout, said = self.processes[rank].stdout, b""
        if stdout is not None:
            os.set_blocking(stdout.fileno(), False)  # whatever else may hold the other end
            with contextlib.suppress(BlockingIOError):
                said = os.read(stdout.fileno(), 1 << 10)
        return first or READY.encode() in said

    def wait_ready(self, seconds: float) -> None:
        """Returns when every worker has its model and is about to connect."""
        deadline = time.monotonic() + seconds
        waiting = selectors.DefaultSelector()
        for rank, process in self.processes.items():
            assert process.stdout is not None
            waiting.register(process.stdout, selectors.EVENT_READ, rank)
        while waiting.get_map():
            events = waiting.select(max(0.0, deadline - time.monotonic()))
            if not events:
                raise WorkerFailed(f"ranks {self.loading} were not ready within {seconds:g} s")
            for key, _ in events:
                stream: Any = key.fileobj
                if stream.readline().strip() != READY:
                    self.processes[key.data].wait(5)
                    raise WorkerFailed(self.exit_report(key.data))
                waiting.unregister(key.fileobj)
                self._ready.add(key.data)
                self.loading.remove(key.data)

    def check(self, ranks: Iterable[int]) -> None:
        """Raises WorkerFailed if one of these ranks has ended."""
        for rank in ranks:
            if self.processes[rank].poll() is not None:
                raise WorkerFailed(self.exit_report(rank))

    def exit_report(self, rank: int) -> str:
        """How a worker ended, and why. Where it gave no reason, its output is passed on."""
        code = self.processes[rank].poll()
        self.errors[rank].seek(0)
        lines = [line for line in self.errors[rank].read().splitlines() if line.strip()]
        reasons = [line.removeprefix(FAILURE) for line in lines if line.startswith(FAILURE)]
        crashed = any(line.startswith(("Traceback", "Fatal Python error")) for line in lines)
        if not reasons and lines and (crashed or code):
            for line in lines[-PASSED_ON:]:
                say(f"rank {rank} wrote: {line}")
            reasons = lines[-1:] if crashed and code and code > 0 else []
        return f"rank {rank} {_ending(code)}" + (f": {reasons[-1]}" if reasons else "")

    def first_failed(self, named: int | None = None) -> str | None:
        """The report of the worker that ended by itself with an error: of rank `named`, whom the
        others blame, or else of the first."""
        time.sleep(0.2)  # a peer's loss is noticed before its exit status is
        if named in self.processes:
            return self.exit_report(named) if self.processes[named].poll() else None
        for rank, process in self.processes.items():
            if process.poll() not in (None, 0):
                return self.exit_report(rank)
        return None

    def stop(self) -> None:
        """Ends every worker: by itself within a moment, else by force."""
        for patience, end in ((1.0, subprocess.Popen.terminate), (2.0, subprocess.Popen.kill)):
            deadline = time.monotonic() + patience
            for process in self.processes.values():
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    end(process)
        for rank, process in self.processes.items():
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            self.errors[rank].close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end(at_once=kind is not None)

    def end(self, *, at_once: bool) -> None:
        """Ends every worker; unless `at_once`, they were told to stop and end by themselves."""
        if at_once:
            for process in self.processes.values():
                process.terminate()
        self.stop()
