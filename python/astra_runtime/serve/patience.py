"""Ranks of this machine that are slow are told from ranks that are gone.

A process that gets hardly any core sends nothing for seconds, and neither does one that was
stopped. What the kernel says of its threads tells them apart.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cores import available_bytes

log = logging.getLogger("astra_runtime.serve")

MOST_PATIENCE = 6.0  # of a mesh's timeout, for a rank that computes
LOOK_SECONDS = 0.25  # between two looks at it
SAID_SECONDS = 10.0  # between two lines of the log
_PROCESSES = Path("/proc")
COMPUTING = frozenset("RD")  # has a core, waits for one, or for a page of its weights


def about_this_process() -> dict[str, Any]:
    """What a rank tells the others of itself: its process, its machine, the memory there."""
    pid = os.getpid()
    return {
        "pid": pid,
        "begun": _begun(pid),
        "machine": machine(),
        "memory": available_bytes(),
    }


def machine() -> str:
    """Names this machine, until it starts anew; containers of one machine are told apart."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {socket.gethostname()}"


def _stat(file: Path) -> list[str]:
    """What the kernel says of a process or thread, from its state on."""
    return file.read_text().rpartition(")")[2].split()


def _begun(pid: int) -> int:
    """Clock ticks from the machine's start to that of a process."""
    return int(_stat(_PROCESSES / f"{pid}/stat")[19])


def computes(about: Mapping[str, Any]) -> bool:
    """Whether another process, which has said so much of itself, is of this machine and computes
    at the moment, or would if it had a core. One that was stopped does not, nor one that waits."""
    if about.get("machine") != machine() or about["pid"] == os.getpid():
        return False
    try:
        pid = about["pid"]
        if _begun(pid) != about["begun"]:  # another one has its number by now
            return False
        threads = (_PROCESSES / f"{pid}/task").iterdir()
        return any(_stat(thread / "stat")[0] in COMPUTING for thread in threads)
    except (OSError, LookupError):  # it has ended
        return False


class Patience:
    """What one rank's mesh is asked for at the end of a wait (`Mesh.more_time`).

    Args:
        timeout: of the mesh.
        about: by rank, what it has said of itself.
    """

    def __init__(self, timeout: float, about: Mapping[int, Mapping[str, Any]]) -> None:
        self._most, self._about = MOST_PATIENCE * timeout, about
        self._said = -SAID_SECONDS

    def __call__(self, ranks: tuple[int, ...], waited: float) -> float:
        """Seconds that these ranks get beyond those that they were waited for."""
        if waited >= self._most or not all(computes(self._about.get(rank, {})) for rank in ranks):
            return 0.0
        now = time.monotonic()
        if now - self._said >= SAID_SECONDS:
            self._said = now
            names = ", ".join(f"rank {rank}" for rank in ranks)
            log.warning("%s: nothing for %.3g s, but it computes: it gets more time", names, waited)
        return LOOK_SECONDS
