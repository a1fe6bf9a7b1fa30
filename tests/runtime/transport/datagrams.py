"""Meshes over datagrams for the tests, and what may become of a datagram on its way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from astra_runtime.transport import Mesh, local_mesh
from astra_runtime.transport.datagram import PAUSE, DatagramMesh, connect_datagrams

from ..ranks import MAKERS, PLAN, together

Fate = Callable[[bytes], Sequence[bytes]]  # what becomes of a datagram
SECRET = bytes(range(32))
# A wait that ends for another reason than its deadline ends before a quarter of it, however busy
# the machine is: after that a frame that has begun is given up.
LONG = 60.0
EARLY = LONG * PAUSE


def datagram_mesh(
    world_size: int, *, timeout: float = 30.0, fec_group: int = 0
) -> list[DatagramMesh]:
    return _over(local_mesh(world_size, timeout=timeout), fec_group)


def tls_datagram_mesh(
    world_size: int, *, timeout: float = 30.0, fec_group: int = 0
) -> list[DatagramMesh]:
    return _over(MAKERS["tls"](world_size, timeout=timeout), fec_group)


def _over(meshes: list[Mesh], fec_group: int) -> list[DatagramMesh]:
    return together(
        [lambda mesh=mesh: connect_datagrams(mesh, fec_group=fec_group) for mesh in meshes]
    )


class Lane:
    """A peer's socket whose outgoing datagrams meet a fate."""

    def __init__(self, sock: socket.socket, fate: Fate) -> None:
        self.sock, self.fate = sock, fate

    def sendmsg(self, pieces: Sequence[bytes]) -> int:
        datagram = b"".join(pieces)
        for each in self.fate(datagram):
            self.sock.send(each)
        return len(datagram)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)


def lane(mesh: DatagramMesh, to: int, fate: Fate) -> Lane:
    """Gives what `mesh` sends to rank `to` a fate."""
    peer = mesh._peers[to]
    peer.sock = Lane(peer.sock, fate)  # type: ignore[assignment]
    return peer.sock  # type: ignore[return-value]


def dropping(*lost: int) -> Fate:
    """Drops the datagrams of these numbers, counted from 0."""
    count = iter(range(10**9))
    return lambda datagram: [] if next(count) in lost else [datagram]


def content(rank: int, block: int, size: int) -> bytes:
    return bytes((rank * 31 + block * 7 + position) % 251 for position in range(size))


def told(
    mesh: DatagramMesh,
    block: int,
    size: int,
    sent: threading.Barrier | None = None,
    **options: Any,
) -> dict[int, bytes]:
    """Sends this rank's content of a block to all, and receives theirs; with `sent`, when all that
    will come has come."""
    others = [rank for rank in range(mesh.world_size) if rank != mesh.rank]
    payload, partial = content(mesh.rank, block, size), options.get("partial", False)
    mesh.send(payload, block=block, plan=PLAN, to=others, partial=partial)
    if sent is not None:
        sent.wait()
    views = mesh.receive(dict.fromkeys(others, size), block=block, plan=PLAN, **options)
    return {rank: bytes(view) for rank, view in views.items()}
