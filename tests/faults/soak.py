"""Millions of exchanges between two processes inside TLS: does anything grow, does anything change?

    python -m tests.faults.soak [--exchanges 3000000] [--report FILE]

An exchange is one block's: each rank sends its codes and receives the other's. A round is an answer
of an engine, which has to be the first one bit for bit, and exchanges without a model, whose bytes
are compared as well. Memory is read at regular intervals, and a straight line is laid through the
second half of what was read: the allocator settles during the first.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from astra_runtime import Engine, connect
from astra_runtime.transport import Mesh
from astra_runtime.transport.certificates import can_make_keys
from astra_runtime.wire import Frame
from tests.runtime.ranks import free_ports, key_folder

from .forks import Forks, Told
from .rank import BLOCKS, subject
from .report import Row, write
from .wires import PLAN, resident

ROUND = 2000  # exchanges
SIZE = 320  # bytes of the frames without a model
READINGS = 200
MIB_PER_HOUR = 1.0


def _threads_and_descriptors() -> list[int]:
    return [threading.active_count(), len(os.listdir("/proc/self/fd"))]


def _slope(readings: list[tuple[float, int]]) -> float:
    """MiB an hour: the straight line of least squares through seconds and bytes."""
    seconds, size = np.array(readings).T
    return float(np.polyfit(seconds / 3600, size / 2**20, 1)[0])


def _exchange(mesh: Mesh, frame: Frame, wanted: bytes, count: int) -> bool:
    """So many blocks' codes each way, without a model; whether all came as they were sent."""
    other, right = 1 - mesh.rank, True
    for block in range(count):
        mesh.send(frame, block=block, plan=PLAN, to=(other,))
        view = mesh.receive({other: len(wanted)}, block=block, plan=PLAN)[other]
        right = right and view == wanted
    return right


def soak(told: Told, number: int, peers: list[str], keys: str | None, rounds: int) -> None:
    """One rank. Told: rounds in which nothing changed; growth and slope of memory; `held`."""
    model, book, inputs = subject()
    with connect(number, 2, peers, keys=keys) as mesh, Engine(model, book, mesh) as engine:
        frame = mesh.buffer(SIZE)
        frame.payload[:] = bytes([number]) * SIZE
        wanted, first, same = bytes([1 - number]) * SIZE, b"", 0
        readings: list[tuple[float, int]] = []
        before: list[int] = []
        ms = np.full(rounds, np.nan)
        for turn in range(rounds):
            if turn == rounds // 2:
                gc.collect()
                before = _threads_and_descriptors()
            if turn % max(1, rounds // READINGS) == 0:
                readings.append((time.monotonic(), resident()))
            answer = engine(**inputs).last_hidden_state
            digest = hashlib.sha256(answer.numpy().tobytes()).digest()
            first = first or digest
            start = time.perf_counter()
            right = _exchange(mesh, frame, wanted, ROUND - BLOCKS)
            ms[turn] = 1e3 * (time.perf_counter() - start) / (ROUND - BLOCKS)
            same += right and digest == first
        gc.collect()
        told(same=same, held=_threads_and_descriptors() == before)
        told(curve=[size - readings[0][1] for _, size in readings[:: READINGS // 20]])
        settled = readings[len(readings) // 2 :]
        told(slope=_slope(settled), grown=settled[-1][1] - settled[0][1])
        told(seconds=settled[-1][0] - settled[0][0])
        told(p50_ms=float(np.percentile(ms, 50)), p99_ms=float(np.percentile(ms, 99)))


def run(forks: Forks, exchanges: int, seconds: float) -> Row:
    rounds = -(-exchanges // ROUND)
    keys = str(key_folder()) if can_make_keys() else None
    options: dict[str, Any] = {"peers": free_ports(2), "keys": keys, "rounds": rounds}
    tasks = [("tests.faults.soak:soak", {**options, "number": n}) for n in range(2)]
    outcomes = forks.run(tasks, seconds)
    row = Row("soak", f"make soak SOAK_EXCHANGES={exchanges}", tried=rounds * ROUND)
    told = [outcome.told for outcome in outcomes]
    if any(outcome.status != 0 for outcome in outcomes):
        row.failures.append(f"ended early: {outcomes}")
        return row
    row.survived = ROUND * min(one["same"] for one in told)
    if not all(one["held"] for one in told):
        row.failures.append("threads or descriptors changed")
    names = ("slope", "grown", "seconds", "p50_ms", "p99_ms")
    worst = {name: max(one[name] for one in told) for name in names}
    row.extra = {
        "p50_ms": worst["p50_ms"],  # means of a round's exchanges without a model
        "p99_ms": worst["p99_ms"],
        "mib_per_hour": worst["slope"],
        "grown_bytes": worst["grown"],
        "seconds": worst["seconds"],
        "growth_curves": [one["curve"] for one in told],  # bytes, at equal intervals
    }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exchanges", type=int, default=3_000_000)
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    with Forks(["tests.faults.rank:prepare"]) as forks:
        row = run(forks, given.exchanges, seconds=60 + given.exchanges / 20)
    slope = row.extra.get("mib_per_hour", float("inf"))
    if slope >= MIB_PER_HOUR:
        row.failures.append(f"memory grows by {slope:.2f} MiB an hour")
    print(row.as_dict())
    if given.report is not None:
        write([row], given.report)
    return 0 if row.survived == row.tried and not row.failures else 1


if __name__ == "__main__":
    raise SystemExit(main())
