"""Every packet is lost from some moment on, between two network namespaces: a cable that was cut.

Unlike a relay that stops, nobody acknowledges anything any more: the kernel retransmits, and gives
the connection up by TCP_USER_TIMEOUT where no deadline has passed before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from astra_runtime.errors import AstraError
from astra_runtime.transport import Mesh, connect
from astra_runtime.transport.certificates import can_make_keys
from bench.link import switch
from bench.link.model import Link
from bench.link.switch import Namespaces
from tests.runtime.ranks import key_folder, together, wait_for

from .report import Row
from .wires import PLAN

COMMAND = "python -m pytest -m faults tests/faults/test_packets.py"
LINK = Link(10, rtt_ms=2)
DEADLINE = 1.0  # seconds
TOLERANCE = 0.10
UNACKNOWLEDGED = DEADLINE + 5  # seconds, see TcpMesh: this is above twice so little
AMPLE = 60.0  # seconds, which no wait takes that does not hang
SIZE = 60_000  # 50 ms on this link
BLOCKS = 6
ANSWER = 0xFF00  # a control message, which goes over TCP with both transports
BACKENDS = ("tcp", "datagram")
MOMENTS = ("before", "mid")
WHY = switch.unavailable() or ("" if can_make_keys() else "no cryptography, and no loopback")
pytestmark = pytest.mark.skipif(bool(WHY), reason=f"no cable to cut here: {WHY}")


def joined(net: Namespaces, backend: str) -> list[Mesh]:
    """Two ranks in this process, each with its sockets in a namespace of its own."""
    options: dict[str, Any] = {"backend": backend, "timeout": AMPLE, "keys": key_folder()}
    peers = [f"{address}:7000" for address in net.addresses]

    def join(rank: int) -> Mesh:
        return net.inside(rank, lambda: connect(rank, 2, peers, **options))

    return together([lambda rank=rank: join(rank) for rank in range(2)])


def exchange(mesh: Mesh, block: int, size: int) -> None:
    mesh.send(bytes(size), block=block, plan=PLAN, to=[1 - mesh.rank])
    mesh.receive({1 - mesh.rank: size}, block=block, plan=PLAN)


def last_wait(
    mesh: Mesh, block: int, size: int = SIZE, **options: float
) -> tuple[AstraError | None, float]:
    """How a wait ended for which nothing can come, and after how many seconds."""
    start = time.monotonic()
    try:
        mesh.receive({1 - mesh.rank: size}, block=block, plan=PLAN, **options)
    except AstraError as error:
        return error, time.monotonic() - start
    return None, time.monotonic() - start


def cut(net: Namespaces, meshes: list[Mesh], block: int, moment: str) -> list[Any]:
    """Ends of both ranks' waits for the block at which the packets begin to vanish."""
    sent, gone = threading.Barrier(3), threading.Event()

    def work(mesh: Mesh) -> Any:
        for number in range(block):
            exchange(mesh, number, 1000)
        if moment == "mid":
            mesh.send(bytes(SIZE), block=block, plan=PLAN, to=[1 - mesh.rank])
        sent.wait(60)
        gone.wait(60)
        if moment == "before":
            mesh.send(bytes(SIZE), block=block, plan=PLAN, to=[1 - mesh.rank])
        mesh.timeout = DEADLINE
        return last_wait(mesh, block)

    def shears() -> None:
        sent.wait(60)
        if moment == "mid":
            time.sleep(LINK.seconds(SIZE) / 3)
        net.cut()
        gone.set()

    found = together([shears, *(lambda mesh=mesh: work(mesh) for mesh in meshes)])[1:]
    for mesh, (error, _) in zip(meshes, found, strict=True):
        mesh.abort(error or RuntimeError("nothing was lost"))
    return found


def try_cut(row: Row, backend: str, block: int, moment: str, alone: bool = True) -> None:
    with Namespaces(2, LINK) as net:
        found = cut(net, joined(net, backend), block, moment)
        wait_for(lambda: net.report().lost > 0)
    for rank, (error, seconds) in enumerate(found):
        told = type(error).__name__, getattr(error, "rank", None), getattr(error, "block", None)
        right = told == ("DeadlineExceeded", 1 - rank, block)
        right &= DEADLINE - seconds <= TOLERANCE * DEADLINE
        right &= not alone or seconds - DEADLINE <= TOLERANCE * DEADLINE
        case = f"{backend}, {moment} block {block}, rank {rank}"
        row.count(None if right else f"{case}: {error!r} after {seconds:.3f} s", 1e3 * seconds)


def try_unacknowledged(row: Row, backend: str) -> None:
    """A wait of a minute, with bytes under way that nobody will acknowledge."""

    def work(mesh: Mesh) -> Any:
        mesh.send(b"unread", block=ANSWER, plan=PLAN, to=[1 - mesh.rank])
        return last_wait(mesh, 1, timeout=60.0)

    with Namespaces(2, LINK) as net:
        meshes = joined(net, backend)
        for mesh in meshes:
            mesh.timeout = DEADLINE
        together([lambda mesh=mesh: exchange(mesh, 0, 1000) for mesh in meshes])
        net.cut()
        found = together([lambda mesh=mesh: work(mesh) for mesh in meshes])
        for mesh in meshes:
            mesh.abort(RuntimeError("the end"))
    for rank, (error, seconds) in enumerate(found):
        told = type(error).__name__, getattr(error, "rank", None), getattr(error, "block", None)
        right = told == ("PeerLost", 1 - rank, 1)
        right &= 0.9 * UNACKNOWLEDGED <= seconds <= 1.3 * UNACKNOWLEDGED
        case = f"{backend}, rank {rank}"
        row.count(None if right else f"{case}: {error!r} after {seconds:.3f} s", 1e3 * seconds)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cut_cable(backend: str) -> None:
    row = Row("packets_vanish", COMMAND)
    try_cut(row, backend, 2, "before", alone=False)
    row.check()


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_packets_that_vanish(record: Callable[[Row], None]) -> None:
    row = Row("packets_vanish", COMMAND, extra={"deadline_ms": 1e3 * DEADLINE})
    for backend in BACKENDS:
        for moment in MOMENTS:
            for block in range(BLOCKS):
                try_cut(row, backend, block, moment)
    record(row)
    row.check()


@pytest.mark.faults
def test_unacknowledged_bytes(record: Callable[[Row], None]) -> None:
    row = Row("unacknowledged", COMMAND, extra={"user_timeout_ms": 1e3 * UNACKNOWLEDGED})
    for backend in BACKENDS:
        try_unacknowledged(row, backend)
    record(row)
    row.check()
