"""Ending connections so that nothing sent is lost, all at once and within one bound.

A close with unread input resets a connection, and a reset discards what the peer's kernel has not
acknowledged yet. So each direction is shut down first and its acknowledgement waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterable
from typing import Final

from astra_runtime.transport.connection import Connection
from astra_runtime.transport.lifetime import WriteTurn

# Retransmissions in a row that a peer's kernel leaves unanswered before it is given up: about 3 s
# at the least. One whose receive buffer is full still answers, and is waited for.
RETRANSMISSIONS: Final = 4
_TCP_CLOSE: Final = 7  # the state of a connection that was reset, in Linux's tcp_states.h
_LONGEST_PAUSE: Final = 0.02


def deliver(peers: Iterable[Connection], turn: WriteTurn, deadline: Callable[[], float]) -> None:
    """Sends what is unsent, shuts the connections' directions down and waits until the peers'
    kernels have it all, or are gone, or `deadline` has passed, which may come nearer meanwhile."""
    remaining, pause = list(peers), 1e-4
    while remaining:
        before = sum(peer.unsent_bytes for peer in remaining)
        remaining = [peer for peer in remaining if not _is_delivered(peer, turn, deadline)]
        if not remaining or time.monotonic() >= deadline():
            return
        progress = sum(peer.unsent_bytes for peer in remaining) < before
        pause = 1e-4 if progress else min(2 * pause, _LONGEST_PAUSE)
        time.sleep(pause)


def _is_delivered(peer: Connection, turn: WriteTurn, deadline: Callable[[], float]) -> bool:
    """Whether there is nothing left to wait for."""
    try:
        with turn.within(deadline() - time.monotonic()) as taken:
            if not taken or not peer.flush():
                return _is_unreachable(peer.sock)
            if not peer.send_closed:
                peer.send_closed = True
                peer.sock.shutdown(socket.SHUT_WR)
        (unacknowledged,) = struct.unpack("i", fcntl.ioctl(peer.sock, termios.TIOCOUTQ, bytes(4)))
        return not unacknowledged or _is_unreachable(peer.sock)
    except OSError:
        return True  # the peer is gone


def answers(sock: socket.socket) -> bool:
    """Whether the peer's kernel has answered all that it had to, as far as can be told."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    state, retransmissions, probes = info[0], info[2], info[3]
    return state != _TCP_CLOSE and retransmissions < 2 and not probes


def _is_unreachable(sock: socket.socket) -> bool:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    state, retransmissions = info[0], info[2]
    return state == _TCP_CLOSE or retransmissions >= RETRANSMISSIONS


def shut_down(peers: Iterable[Connection]) -> None:
    """Ends both directions, so that whoever still reads or writes here notices."""
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.sock.shutdown(socket.SHUT_RDWR)
