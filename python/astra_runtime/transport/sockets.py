"""The sockets of a mesh: the options of a connection, and listening at a rank's addresses."""

from __future__ import annotations

import errno
import math
import socket
from typing import Final

from astra_runtime.errors import ConnectFailed
from astra_runtime.transport.addresses import Endpoint, resolve

SEND_BUFFER: Final = 2 << 20  # asked of the kernel: usual frames (≤128 KiB) leave in one call
BACKLOG: Final = 4096  # a dial that finds the kernel's queue full is repeated after a second only

_LONGEST_POLL: Final = 1e6  # seconds


def prepare(sock: socket.socket) -> None:
    """The socket options of a connection, to be set before it connects or listens."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A worker may wait for hours; a peer that lost its power says nothing at all.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)


def milliseconds(seconds: float) -> int:
    """A time to wait as `poll` takes it; of one that means "never", a part, and then the rest."""
    return math.ceil(1000 * min(max(seconds, 0.0), _LONGEST_POLL))


def listen(host: str, port: int, rank: int) -> list[socket.socket]:
    """Sockets that listen at every address of this machine that `host` stands for.

    port: 0, any free one, for a host of one address.

    Raises ConnectFailed, with the remedy.
    """
    where = f"{host}:{port}"
    try:
        endpoints = resolve(host, port, passive=True)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConnectFailed(f"rank {rank} cannot resolve {host!r}: {reason}") from error
    listeners: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for endpoint in endpoints:
            try:
                listeners.append(_listen_at(endpoint))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error
    except OSError as error:
        for listener in listeners:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"rank {rank} cannot listen: port {port} of {host} is in use"
        else:
            reason = f"rank {rank} cannot listen at {where}: {error.strerror}"
        raise ConnectFailed(reason) from error
    if not listeners:
        raise ConnectFailed(
            f"rank {rank} cannot listen at {where}: that is no address of this machine; name one "
            "that is by --listen (host= of connect)"
        ) from absent
    return listeners


def check_host(host: str, rank: int) -> None:
    """Raises the ConnectFailed of `listen` for a host that is not this machine's; ports, which may
    be free later, are not looked at."""
    for listener in listen(host, 0, rank):
        listener.close()


def _listen_at(endpoint: Endpoint) -> socket.socket:
    listener = socket.socket(endpoint.family, endpoint.kind, endpoint.protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        prepare(listener)
        listener.bind(endpoint.address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
