"""faults.json: a row for every kind of fault, in the form that all results have."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import report as results

# The least number of cases that a row has to tell of.
LEAST = {
    "kill": 324,
    "kill_large": 36,
    "kill_datagram": 216,
    "stop": 30,
    "blackhole": 10,
    "half_open": 10,
    "packets_vanish": 20,
    "unacknowledged": 4,
    "slow": 10,
    "frame_structured": 200,
    "frame_mutated": 100_000,
    "datagram_structured": 400,
    "datagram_mutated": 100_000,
    "abort_structured": 2000,
    "abort_mutated": 30_000,
    "fuzz": 100_000_000,
    "refusals": 11,
    "connections": 2000,
    "degraded": 50,
    "soak": 1_000_000,
}


def percentile(values: Sequence[float], part: float) -> float | None:
    """Nearest rank; None of nothing."""
    return sorted(values)[math.ceil(part * len(values)) - 1] if values else None


@dataclass
class Row:
    """One kind of fault. `ms`: how long each case took to end as specified, where it is timed."""

    name: str
    command: str
    seed: int | None = None
    tried: int = 0
    survived: int = 0
    ms: array[float] = field(default_factory=lambda: array("d"))  # small, where memory is watched
    failures: list[str] = field(default_factory=list)  # what else happened, the first few
    extra: dict[str, Any] = field(default_factory=dict)

    def count(self, fault: str | None, milliseconds: float | None = None) -> None:
        """One more case; `fault` says what was wrong with its result, None: nothing."""
        self.tried += 1
        self.survived += fault is None
        if milliseconds is not None:
            self.ms.append(milliseconds)
        if fault is not None and len(self.failures) < 20:
            self.failures.append(fault)

    def check(self) -> None:
        assert self.survived == self.tried, "\n".join(self.failures)

    def as_dict(self) -> dict[str, Any]:
        told = {
            "name": self.name,
            "tried": self.tried,
            "survived": self.survived,
            "p50_ms": percentile(self.ms, 0.5),
            "p99_ms": percentile(self.ms, 0.99),
            "seed": self.seed,
            "command": self.command,
            **self.extra,
        }
        return results.rounded(told | ({"failures": self.failures} if self.failures else {}))


def write(rows: Sequence[Row], path: Path) -> None:
    """Puts the rows into the file, in place of those of the same names."""
    before = json.loads(path.read_text())["faults"] if path.is_file() else []
    found = {row["name"]: row for row in before} | {row.name: row.as_dict() for row in rows}
    faults = [found[name] for name in LEAST if name in found]
    results.write(
        path.stem,
        [],
        command="make test-faults fuzz soak",
        folder=path.parent.name,
        results=path.parent.parent,
        extra={"faults": faults},
    )
