"""The sockets of a mesh: the options of a connection, and listening at one address."""

from __future__ import annotations

import errno
import socket
from typing import Final

from astra_runtime.errors import ConnectFailed

SEND_BUFFER: Final = 2 << 20  # asked of the kernel: usual frames (≤128 KiB) leave in one call
BACKLOG: Final = 4096  # a dial that finds the kernel's queue full is repeated after a second only


def prepare(sock: socket.socket) -> None:
    """The socket options of a connection, to be set before it connects or listens."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A worker may wait for hours; a peer that lost its power says nothing at all.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)


def listen(host: str, port: int, rank: int) -> socket.socket:
    """A listening socket at exactly this address (port 0: any free one)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConnectFailed(f"rank {rank} cannot resolve {host!r}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        prepare(listener)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"rank {rank} cannot listen: port {port} of {host} is in use"
        else:
            reason = f"rank {rank} cannot listen at {host}:{port}: {error.strerror}"
        raise ConnectFailed(reason) from error
    return listener
