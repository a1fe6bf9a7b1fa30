"""Timing and the result file that every benchmark writes.

A file is one run: what was run, of which commit, on what, and its cases. A case has our times, the
roofline (`floor_ms`, the least time that the hardware allows, as far as it can be measured) and the
baselines' medians (`peers`).
"""

import importlib.metadata
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from astra_runtime.contention import Watch
from bench.tree import ROOT, commit

from .machine import cores, cpu_name

RESULTS = ROOT / "bench" / "results"
WATCH = Watch()  # of this process, which is one benchmark


@dataclass(frozen=True)
class Times:
    """Percentiles of the time of one call, in milliseconds."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Case:
    """One thing measured. `ratio` is the best baseline's median over ours, None without one.

    `extra` adds keys to the case in the file.
    """

    name: str
    shape: Mapping[str, Any]
    dtype: str
    impl: str
    ms: Times
    floor_ms: float | None = None
    peers: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return min(self.peers.values()) / self.ms.p50 if self.peers else None

    def as_dict(self) -> dict[str, Any]:
        own = {key: value for key, value in asdict(self).items() if key != "extra"}
        return rounded({**own, "ratio": self.ratio, **self.extra})


def measure(
    calls: Mapping[str, Callable[[], object]], *, seconds: float = 0.3, samples: int = 15
) -> dict[str, Times]:
    """Times every call, in turns, so that a disturbance of the machine meets all of them.

    Each call gets about `seconds`, spread over `samples` samples; a sample repeats a short call.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        once = min(_sample(call, 1) for _ in range(3))
        repeats[name] = max(1, math.ceil(seconds / samples / max(once, 1e-7)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            taken[name].append(_sample(call, repeats[name]) * 1e3)
    return {name: percentiles(values) for name, values in taken.items()}


def percentiles(milliseconds: Sequence[float]) -> Times:
    """The 20th, 50th and 80th percentile (nearest rank)."""
    ordered = sorted(milliseconds)
    p20, p50, p80 = (ordered[math.ceil(p * len(ordered)) - 1] for p in (0.2, 0.5, 0.8))
    return Times(p20, p50, p80)


def write(
    name: str,
    cases: Sequence[Case | Mapping[str, Any]],
    *,
    command: str,
    packages: Sequence[str] = ("torch", "numpy"),
    link: Mapping[str, Any] | None = None,
    folder: str | None = None,
    extra: Mapping[str, Any] | None = None,
    device: str | None = None,
    results: Path | None = None,
) -> Path:
    """Writes bench/results/<folder>/<name>.json and returns its path.

    The file says how much of the cores other processes took since this one began.

    `folder` and `device` default to this machine's cores, such as "cpu-2core". `extra` adds
    top-level keys. Cases may come as they are read from such a file. `results` is another folder
    than bench/results.
    """
    contention = WATCH.contention()
    if contention.disturbs:
        print(f"{name}: {contention}; times are disturbed", file=sys.stderr, flush=True)
    versions = {package: importlib.metadata.version(package) for package in packages}
    report = {
        "command": command,
        "commit": commit(),
        "device": device or f"{cpu_name()}, {cores()} cores",
        "versions": {"python": platform.python_version(), **versions},
        "contention": rounded(asdict(contention)),
        "link": link,
        "cases": [case.as_dict() if isinstance(case, Case) else case for case in cases],
        **(extra or {}),
    }
    path = (results or RESULTS) / (folder or f"cpu-{cores()}core") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def _sample(call: Callable[[], object], repeats: int) -> float:
    """Seconds a call takes, as the mean of `repeats` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def rounded(value: Any) -> Any:
    """Five significant digits; more are noise."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
