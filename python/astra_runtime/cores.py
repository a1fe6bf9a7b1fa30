"""Cores and memory of this machine, as this process may use them."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import sys
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY = Path("/proc/meminfo")


def physical_cores(cpus: Path = _CPUS, quota: Path = _QUOTA) -> int:
    """Cores that this process may use; threads of one core count once, and so does a container's
    share of the processor. At least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    found = set()
    for cpu in allowed:
        siblings = str(cpu)
        with contextlib.suppress(OSError):
            siblings = (cpus / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        found.add(siblings)
    count = len(found)
    with contextlib.suppress(OSError, ValueError):
        most, period = quota.read_text().split()
        count = min(count, math.ceil(int(most) / int(period)))  # "max" is no limit
    return max(1, count)


def threads_of(processes: int) -> int:
    """Threads of each of so many processes that share this machine; OMP_NUM_THREADS, as of every
    program that torch is in, where it is set."""
    with contextlib.suppress(ValueError):
        return max(1, int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0]))
    return max(1, physical_cores() // processes)


def available_bytes() -> int:
    """Memory that programs may still take without any being swapped out, by the kernel's estimate.
    OSError: there is no /proc."""
    fields = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def return_free_memory() -> None:
    """Gives back to the system what this process has freed and its allocator keeps for later.

    glibc keeps small blocks, keys and values among them, in an arena of the thread that took them.
    Other allocators do this by themselves, or cannot be asked.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
