"""Ranks for the tests: meshes in one process, threads that act as ranks."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import random
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from astra_runtime.transport import Link, Mesh, connect, local_mesh, peers_of
from astra_runtime.transport.certificates import can_make_keys, make_keys
from astra_runtime.wire import Frame

PLAN = 0x1234
_drawn: deque[str] = deque(maxlen=1000)  # addresses that a test may be about to use


def gloo_mesh(world_size: int, *, timeout: float = 30.0, on_device: bool = False) -> list[Mesh]:
    """All ranks of a gloo mesh in this process: process groups of their own, over one store."""
    import torch.distributed

    from astra_runtime.transport.distributed import DistributedMesh

    dist: Any = torch.distributed  # of whose names it does not export some
    store = dist.HashStore()

    def join(rank: int) -> Mesh:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=60)
        group = dist.ProcessGroupGloo(dist.PrefixStore("a", store), rank, world_size, options)
        return DistributedMesh(group, timeout=timeout, on_device=on_device)

    return together([lambda rank=rank: join(rank) for rank in range(world_size)])


def paced_mesh(world_size: int, *, timeout: float = 30.0) -> list[Mesh]:
    return local_mesh(world_size, timeout=timeout, link=Link(2000, 0.1))


@functools.cache
def key_folder(authority: str = "ours") -> Path:
    """Keys of eight ranks, made once; each `authority` is another one."""
    folder = Path(tempfile.mkdtemp(prefix=f"astra-test-{authority}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_keys(folder, 8)
    return folder


def tls_mesh(world_size: int, *, timeout: float = 30.0, link: Link | None = None) -> list[Mesh]:
    peers, keys = free_ports(world_size), key_folder()

    def join(rank: int) -> Mesh:
        return connect(rank, world_size, peers, keys=keys, timeout=timeout, link=link)

    return together([lambda rank=rank: join(rank) for rank in range(world_size)])


MAKERS: dict[str, Callable[..., list[Mesh]]] = {
    "tcp": local_mesh,
    "gloo": gloo_mesh,
    "paced": paced_mesh,
}
if can_make_keys():
    MAKERS["tls"] = tls_mesh


def open_files() -> set[tuple[str, str]]:
    """The descriptors of this process and what each of them is.

    A test looks at those it opened itself: the collector may close an earlier test's at any time.
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # of this listing
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def together(calls: list[Callable[[], Any]], *, errors_too: bool = False) -> list[Any]:
    """Runs the calls at the same time, one thread each; results, or exceptions, in order."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive(), "a rank hangs"
    if not errors_too:
        for result in results:
            if isinstance(result, BaseException):
                raise result
    return results


def wait_for(condition: Callable[[], Any], pause: float = 0.01) -> Any:
    """What the condition gives once that is true, which takes no minute on the slowest machine."""
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(pause)
    return found


def as_ranks(meshes: list[Mesh], work: Callable[[Mesh], Any], **options: bool) -> list[Any]:
    def run(mesh: Mesh) -> Any:
        with mesh:
            return work(mesh)

    return together([lambda mesh=mesh: run(mesh) for mesh in meshes], **options)


def pattern(rank: int, block: int, size: int) -> bytes:
    return bytes((rank * 31 + block * 7 + position) % 251 for position in range(min(size, 500)))


def fill(frame: Frame, rank: int, block: int) -> None:
    head = pattern(rank, block, frame.size)
    frame.payload[: len(head)] = head


def all_to_all(mesh: Mesh, blocks: int, size: int) -> None:
    frame, others = mesh.buffer(size), peers_of(mesh)
    for block in range(blocks):
        fill(frame, mesh.rank, block)
        mesh.send(frame, block=block, plan=PLAN, to=others)
        views = mesh.receive(dict.fromkeys(others, size), block=block, plan=PLAN)
        for rank in others:
            assert len(views[rank]) == size
            assert bytes(views[rank][:500]) == pattern(rank, block, size)


def free_ports(count: int) -> list[str]:
    """Addresses nobody listens at, below the range that the kernel hands to outgoing dials.

    A port may be taken between this look and its use. So test processes that run side by side draw
    from ports of their own, and none is drawn again soon.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    addresses: list[str] = []
    while len(addresses) < count:
        port = random.SystemRandom().randrange(15_000 + own, 32_000, processes)
        address = f"127.0.0.1:{port}"
        if address in _drawn:
            continue
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            _drawn.append(address)
            addresses.append(address)
    return addresses


def dial(address: str) -> socket.socket:
    """A connection to an address at which somebody listens by now, or will in a moment."""
    host, port = address.split(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            return socket.create_connection((host, int(port)), timeout=60)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise AssertionError("nobody listens")


def read_all(sock: socket.socket) -> bytes:
    """What comes until the other side ends or resets the connection."""
    data = b""
    with contextlib.suppress(OSError):
        while part := sock.recv(4096):
            data += part
    return data


class Deadlines:
    """In place of `time` where ranks connect: deadlines pass when a test says so."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead

    def over(self) -> None:
        self._ahead = 1e6


def met_by(stranger: Callable[[socket.socket], Any], **options: Any) -> tuple[Any, Any]:
    """What rank 1 meets that dials a `stranger` in rank 0's place, and what that one returns."""
    address, own = free_ports(2)
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:

        def answer() -> Any:
            link, _ = server.accept()
            with link:
                return stranger(link)

        dialer = functools.partial(connect, 1, 2, [address, own], **options)
        met, answered = together([dialer, answer], errors_too=True)
        return met, answered


def environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root / "python"), str(root)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def send_blocks(mesh: Mesh, payload: bytes, to: int) -> None:
    """Sends until that fails, for a minute."""
    deadline, blocks = time.monotonic() + 60, itertools.cycle(range(100))
    while time.monotonic() < deadline:
        mesh.send(payload, block=next(blocks), plan=PLAN, to=[to])
        time.sleep(0.005)
