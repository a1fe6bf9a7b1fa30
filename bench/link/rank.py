"""One rank of a comparison of links, as a process: `python -m bench.link.rank SETTINGS`.

All ranks begin a repeat at one moment of the machine's clock, which rank 0 names, and the links are
idle then. A rank prints, as JSON, a list of pairs: the seconds from that moment until it has
finished, and the CPU seconds of its thread in them.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from astra_runtime import Codebook, Engine
from astra_runtime.codes.registry import codec_named
from astra_runtime.transport import Link as PacedLink
from astra_runtime.transport import Mesh, peers_of
from astra_runtime.transport.pacing import PacedMesh
from astra_runtime.transport.sockets import prepare
from astra_runtime.transport.tcp import TcpMesh
from bench.report import ROOT

_READY: Final = 0xFFE0  # control numbers that the engine does not use
_GO: Final = 0xFFE1
WARM_UP: Final = 2  # calls before anything is timed


@dataclass(frozen=True)
class Settings:
    """What a rank runs. `paced`: (Mbit/s, delay in ms) of a link emulated by the sender."""

    rank: int
    addresses: list[str]
    space: str
    tokens: int
    repeats: int
    paced: tuple[float, float] | None = None


@dataclass(frozen=True)
class Task:
    """A model, what it exchanges, and an input, the same on every rank."""

    model: Any
    codebook: Codebook
    input_ids: torch.Tensor


def task(space: str, tokens: int) -> Task:
    """The tests' tiny llama: "none" sends dense keys and values, "kv" codes of 15 bits a token."""
    from tests.runtime.models import inputs_for, tiny, windows_for

    model = tiny("llama", max_position_embeddings=max(256, tokens))
    if not codec_named(space).coded:
        codebook = Codebook(space)
    else:
        codebook = Codebook.fit(
            model, windows_for("llama"), space=space, groups=3, codewords=32, iterations=4
        )
    return Task(model, codebook, inputs_for("llama", tokens)["input_ids"])


def join(rank: int, addresses: list[str]) -> Mesh:
    """A mesh in plaintext over plain connections, as `local_mesh` has within a process: `connect`
    would ask for keys off loopback, and two namespaces of one machine are no network to protect."""
    places = [(host, int(port)) for host, port in (a.rsplit(":", 1) for a in addresses)]
    sockets: dict[int, socket.socket] = {}
    with socket.create_server(places[rank]) as listener:
        for low in range(rank):
            sockets[low] = _dial(places[low])
            sockets[low].sendall(struct.pack("<H", rank))
        for _ in range(rank + 1, len(places)):
            accepted, _ = listener.accept()
            (high,) = struct.unpack("<H", accepted.recv(2, socket.MSG_WAITALL))
            sockets[high] = accepted
    for connection in sockets.values():
        prepare(connection)
    return TcpMesh(rank, len(places), sockets)


def _dial(place: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + 60  # the other rank may still be importing
    while True:
        try:
            return socket.create_connection(place)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def begin(mesh: Mesh) -> float:
    """Waits for all ranks, then for a common moment; returns it."""
    others = peers_of(mesh)
    if mesh.rank == 0:
        mesh.receive(dict.fromkeys(others, 0), block=_READY, plan=0)
        moment = time.monotonic() + 0.05  # longer than the message takes
        mesh.send(struct.pack("<d", moment), block=_GO, plan=0, to=others)
    else:
        mesh.send(b"", block=_READY, plan=0, to=[0])
        moment = struct.unpack("<d", mesh.receive({0: 8}, block=_GO, plan=0)[0])[0]
    remaining = moment - time.monotonic()
    if remaining < 0:
        raise RuntimeError(f"the start came {-remaining:.3f} s late: the link is too slow for this")
    time.sleep(max(0.0, remaining - 1e-3))
    while time.monotonic() < moment:  # a sleep would end late
        pass
    return moment


def run(settings: Settings) -> list[tuple[float, float]]:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[settings.rank % len(cores)]})
    torch.set_num_threads(1)
    todo = task(settings.space, settings.tokens)
    joined = join(settings.rank, settings.addresses)
    if settings.paced is not None:
        joined = PacedMesh(joined, PacedLink(*settings.paced))
    taken = []
    with (
        joined as mesh,
        Engine(todo.model, todo.codebook, mesh) as engine,
    ):
        for repeat in range(WARM_UP + settings.repeats):
            moment, before = begin(mesh), time.thread_time()
            engine(input_ids=todo.input_ids)
            if repeat >= WARM_UP:
                taken.append((time.monotonic() - moment, time.thread_time() - before))
            mesh.flush()
    return taken


def outputs_of(processes: Sequence[subprocess.Popen[bytes]], patience: float) -> list[bytes]:
    """What every rank printed; whatever happens, no process is left."""
    try:
        outputs = [process.communicate(timeout=patience)[0] for process in processes]
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        if failed:
            raise RuntimeError(f"ranks {failed} failed; what they said stands above")
        return outputs
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def popen_options() -> dict[str, Any]:
    """Of a rank's process: this checkout's packages, one thread, its answer on a pipe."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE}


def command(settings: Settings) -> list[str]:
    return [sys.executable, "-m", "bench.link.rank", json.dumps(asdict(settings))]


if __name__ == "__main__":
    print(json.dumps(run(Settings(**json.loads(sys.argv[1])))))
