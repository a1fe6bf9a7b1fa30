"""A rank's mesh, and the other end of its connection in the hands of a test."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from astra_runtime.transport.credentials import Keys
from astra_runtime.transport.sockets import prepare
from astra_runtime.transport.stream import Stream, TlsStream
from astra_runtime.transport.tcp import TcpMesh
from astra_runtime.wire import Frame
from tests.runtime.ranks import key_folder

PLAN = 0x1234
TIMEOUT = 60.0


class Wire:
    """Rank 0's end: makes frames as rank 0 would, and sends what it is told to."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def sealed(self, data: bytes) -> bytes:
        return b"".join(self.stream.seal(memoryview(data)))

    def say(self, data: bytes) -> None:
        """Sends these bytes as they are, and nothing more ever."""
        with contextlib.suppress(OSError):
            self.stream.sock.sendall(data)
            self.stream.sock.shutdown(socket.SHUT_WR)


def frame(payload: bytes, *, sequence: int = 0, plan: int = PLAN, block: int = 0) -> bytes:
    return bytes(Frame.of(payload).stamp(sequence, plan, block, 0))


class Wires:
    """Connections over loopback, one after the other; no handshake but that of TLS."""

    def __init__(self, *, encrypted: bool) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._keys = [Keys(key_folder()).contexts(rank) for rank in (0, 1)] if encrypted else None

    @contextlib.contextmanager
    def connection(self) -> Iterator[tuple[TcpMesh, Wire]]:
        near = socket.create_connection(self._server.getsockname())
        far, _ = self._server.accept()
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        prepare(far)
        ours, theirs = Stream(far), Stream(near)
        if self._keys is not None:
            near.setblocking(False)
            theirs = TlsStream(near, self._keys[0].dialing, accepting=False)
            ours = TlsStream(far, self._keys[1].accepting, accepting=True)
            while not (theirs.handshake() & ours.handshake()):
                pass
            ours.trust()
        mesh = TcpMesh(1, 2, {0: ours}, timeout=TIMEOUT)
        try:
            yield mesh, Wire(theirs)
        finally:
            # no TIME_WAIT, of which a hundred thousand would use up all ports
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            near.close()
            mesh.__exit__(RuntimeError, None, None)

    def close(self) -> None:
        self._server.close()


def resident() -> int:
    """This process's memory, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
