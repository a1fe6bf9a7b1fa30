"""Thousands of calls of an engine over every way to carry them: does memory grow?

    python -m tests.faults.calls [--calls 20000] [transport ...]

Each transport has a process of its own, in which two threads are the ranks. Memory is read at
regular intervals, and a straight line is laid through the second half of what was read: the
allocator settles during the first. What a call kept, were it only the frames that it has sent,
would show as thousands of bytes a call.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from astra_runtime import Codebook, Engine, connect
from astra_runtime.transport import Mesh, local_mesh
from astra_runtime.transport.certificates import can_make_keys
from tests.runtime.models import inputs_for, tiny, windows_for
from tests.runtime.ranks import free_ports, gloo_mesh, key_folder, together

from .forks import Forks, Outcome, Told
from .report import Row
from .wires import resident

READINGS = 200
BYTES_PER_CALL = 100.0  # of a page a call, 4096, a fortieth; the least frame has 28
SMALL = 1 << 20  # bytes that an allocator may come to hold late, however few the calls


def _connected(backend: Any, *, encrypted: bool = False) -> list[Mesh]:
    peers, keys = free_ports(2), key_folder() if encrypted else None
    return together(
        [lambda n=n: connect(n, 2, peers, backend=backend, keys=keys) for n in range(2)]
    )


TRANSPORTS: dict[str, Callable[[], list[Mesh]]] = {
    "threads": lambda: local_mesh(2),
    "tcp": lambda: _connected("tcp"),
    "datagrams": lambda: _connected("datagram"),
    "gloo": lambda: gloo_mesh(2),
}
if can_make_keys():
    TRANSPORTS |= {
        "tcp, TLS": lambda: _connected("tcp", encrypted=True),
        "datagrams, sealed": lambda: _connected("datagram", encrypted=True),
    }


@functools.cache
def subject() -> tuple[Any, Codebook, dict[str, torch.Tensor]]:
    """Model, codebook and input, made before the server forks.

    One block is enough: what is looked for is kept by a call, a frame or a peer.
    """
    torch.set_num_threads(1)
    model = tiny("bert", num_hidden_layers=1)
    options: dict[str, Any] = {"codewords": 16, "iterations": 2, "held_back": 0}
    book = Codebook.fit(model, windows_for("bert"), space="kv", groups=6, **options)
    return model, book, inputs_for("bert", 24)


def prepare() -> None:
    subject()


def serve(told: Told, transport: str, calls: int) -> None:
    """Told: bytes that a call adds, bytes added in the second half, and the curve."""
    # torch makes its pool of threads anew in a forked process, and two threads at once are too many
    torch.set_num_threads(1)
    model, book, inputs = subject()
    readings: list[int] = []

    def work(mesh: Mesh) -> None:
        options = {"on_missing": "degrade", "deadline_ms": 5000} if mesh.lossy else {}
        with mesh, Engine(model, book, mesh, **options) as engine:
            for call in range(calls):
                engine(**inputs)
                if mesh.rank == 0 and call % max(1, calls // READINGS) == 0:
                    readings.append(resident())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, TRANSPORTS[transport]()))
    gc.collect()
    settled = np.array(readings[len(readings) // 2 :], dtype=float)
    step = max(1, calls // READINGS)
    told(
        per_call=float(np.polyfit(step * np.arange(len(settled)), settled, 1)[0]),
        grown=int(settled[-1] - settled[0]),
        curve=[size - readings[0] for size in readings[:: max(1, len(readings) // 20)]],
    )


def flat(outcome: Outcome) -> bool:
    told = outcome.told
    return outcome.status == 0 and (told["per_call"] < BYTES_PER_CALL or told["grown"] < SMALL)


def run(forks: Forks, names: list[str], calls: int) -> Row:
    row = Row("calls", f"python -m tests.faults.calls --calls {calls}", tried=len(names))
    row.extra = {"calls": calls, "bytes_per_call": {}, "grown_bytes": {}, "growth_curves": {}}
    for name in names:
        task = ("tests.faults.calls:serve", {"transport": name, "calls": calls})
        (outcome,) = forks.run([task], seconds=120 + calls / 5)
        if outcome.status != 0:
            row.failures.append(f"{name}: {outcome}")
            continue
        row.extra["bytes_per_call"][name] = round(outcome.told["per_call"], 1)
        row.extra["grown_bytes"][name] = outcome.told["grown"]
        row.extra["growth_curves"][name] = outcome.told["curve"]
        if flat(outcome):
            row.survived += 1
        else:
            row.failures.append(f"{name}: {outcome.told['per_call']:.0f} bytes a call")
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("transports", nargs="*", help=", ".join(TRANSPORTS))
    parser.add_argument("--calls", type=int, default=20_000)
    given = parser.parse_args()
    with Forks(["tests.faults.calls:prepare"]) as forks:
        row = run(forks, given.transports or list(TRANSPORTS), given.calls)
    print(json.dumps(row.as_dict()))
    return 0 if row.survived == row.tried and not row.failures else 1


if __name__ == "__main__":
    raise SystemExit(main())
