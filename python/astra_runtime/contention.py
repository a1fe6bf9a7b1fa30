"""Who else uses this machine: what else runs while something is timed disturbs its times."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
OTHERS, STEAL = 0.05, 0.01  # shares of the cores' time from which on times are called disturbed


@dataclass(frozen=True)
class Contention:
    """Shares of the time of the cores that this process may use, 0 to 1.

    Attributes:
        others: used by other processes; by all but this one and its children that have ended.
        steal: taken by the hypervisor.
    """

    others: float
    steal: float

    @property
    def disturbs(self) -> bool:
        return self.others > OTHERS or self.steal > STEAL

    def __str__(self) -> str:
        return (
            f"other processes took {self.others:.0%} of the cores' time, "
            f"the hypervisor {self.steal:.0%}"
        )


class Watch:
    """Measures contention from its making on; where there is no /proc/stat, it sees none."""

    def __init__(self) -> None:
        self._before = _ticks()

    def contention(self, ours: float = 0.0) -> Contention:
        """Args:
        ours: processor seconds, in this time, of children that still run.
        """
        busy, steal, total, own = (
            now - before for now, before in zip(_ticks(), self._before, strict=True)
        )
        if total <= 0:
            return Contention(0.0, 0.0)
        own += ours * os.sysconf("SC_CLK_TCK")
        return Contention(max(0.0, busy - own) / total, max(0.0, steal) / total)


def stolen_seconds() -> float:
    """What the hypervisor has taken since boot of the cores that this process may use, in steps of
    a clock tick; 0 where there is no /proc/stat."""
    return _ticks()[1] / os.sysconf("SC_CLK_TCK")


def _ticks() -> tuple[float, float, float, float]:
    """Clock ticks since boot of the cores that this process may use: (busy, steal, all), and those
    that it and its ended children used."""
    if not STAT.is_file():
        return 0.0, 0.0, 0.0, 0.0
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    busy = steal = total = 0.0
    for line in STAT.read_text().splitlines():
        name, *counts = line.split()
        if name not in mine:
            continue
        # guest time, behind these eight, is part of user's
        user, nice, system, idle, iowait, irq, softirq, stolen = map(float, counts[:8])
        busy += user + nice + system + irq + softirq
        steal += stolen
        total += user + nice + system + idle + iowait + irq + softirq + stolen
    own = sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")
    return busy, steal, total, own
