"""A full mesh over TCP: non-blocking sockets, one system call a frame, a deadline on every wait.

A frame leaves in `send` straight from its buffer. What the kernel does not take at once (more than
its send buffer, a slow reader) is copied and follows in later calls: while this rank waits in
`receive`, at its next `send`, in `flush` or `close`. Frames that come early stay in the kernel's
receive buffer until their block is asked for, so TCP's own flow control slows a rank far ahead.
Whether the bytes are encrypted on the way is the business of `stream.py`.
"""

from __future__ import annotations

import fcntl
import math
import os
import select
import socket
import ssl
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from astra_runtime import wire
from astra_runtime.errors import (
    CONTROL_BLOCKS,
    AstraError,
    DeadlineExceeded,
    PeerLost,
    WireError,
)
from astra_runtime.transport import mesh as _mesh
from astra_runtime.transport.mesh import Payload, Stats
from astra_runtime.transport.stream import Stream
from astra_runtime.wire import HEADER_SIZE, Frame, Header

SEND_BUFFER: Final = 2 << 20  # asked of the kernel: usual frames (≤128 KiB) leave in one call
MAX_UNSENT: Final = 64 << 20  # bytes kept for a peer that does not read before `send` waits
YIELD_NANOSECONDS: Final = 20_000  # how long a wait yields its core before it sleeps
_TCP_CLOSE: Final = 7  # the state of a connection that was reset, in Linux's tcp_states.h
_ENDED: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR


def prepare(sock: socket.socket) -> None:
    """The socket options of a connection, to be set before it connects or listens."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A worker may wait for hours; a peer that lost its power says nothing at all.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)


class _Peer:
    """One connection: its sequence numbers, its unsent bytes, the frame being read."""

    def __init__(self, rank: int, stream: Stream) -> None:
        self.rank = rank
        self.stream = stream
        self.sock = stream.sock
        self.fd = stream.sock.fileno()
        stream.received = 0  # what came before counts as handshake
        self.sent = 0  # frames, and so the next sequence number
        self.received = 0
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self.watched = 0  # poll events registered
        self.slots = [memoryview(bytearray(HEADER_SIZE))] * 3  # even, odd, control
        self.expected = Header(0, 0, 0, 0, rank)
        self.frame = self.slots[0]
        self.filled = 0
        self.stats = Stats()

    def transmit(self, data: memoryview) -> None:
        """Sends now what the kernel takes and keeps the rest, in order, in memory of its own."""
        for part in self.stream.seal(data):
            taken = 0
            if not self.unsent:
                try:
                    taken = self.sock.send(part)
                except BlockingIOError:
                    taken = 0
                self.stats.bytes_sent_total += taken
            if taken < len(part):
                rest = part[taken:]
                self.unsent.append(rest if self.stream.encrypted else memoryview(bytes(rest)))
                self.unsent_bytes += len(rest)

    def flush(self) -> bool:
        """Sends what it can of the unsent bytes; True when none are left."""
        while self.unsent:
            rest = self.unsent[0]
            try:
                taken = self.sock.send(rest)
            except BlockingIOError:
                return False
            self.stats.bytes_sent_total += taken
            self.unsent_bytes -= taken
            if taken < len(rest):
                self.unsent[0] = rest[taken:]
                return False
            self.unsent.popleft()
        return True

    def expect(self, size: int, block: int, plan: int) -> None:
        """Names the next frame; the reader has room for it and for nothing more."""
        slot = block & 1 if block < CONTROL_BLOCKS else 2
        total = HEADER_SIZE + size
        if len(self.slots[slot]) < total:
            self.slots[slot] = memoryview(bytearray(total))
        self.frame = self.slots[slot][:total]
        self.filled = 0
        self.expected = Header(size, self.received, plan, block, self.rank)

    def advance(self) -> bool:
        """Reads what has come of the expected frame; True when it is complete and correct."""
        before = self.filled
        try:
            count = self.stream.read_into(self.frame[before:] if before else self.frame)
        except BlockingIOError:
            return False
        except ssl.SSLError as error:  # nothing that was not sealed by the peer gets any further
            came = (error.reason or str(error)).lower().replace("_", " ")
            raise WireError("TLS record", "one that it sealed", came, self.rank) from error
        except OSError as error:
            raise self.lost(error.strerror or str(error)) from error
        if count == 0:
            raise self.lost("it closed the connection")
        self.stats.bytes_received_total = self.stream.received
        self.filled = filled = before + count
        if filled < HEADER_SIZE:
            return False
        if before < HEADER_SIZE:
            if wire.is_bye(self.frame, self.rank):
                raise self.lost("it had finished and said BYE")
            wire.check_header(self.frame, self.expected)
        if filled < len(self.frame):
            return False
        self.received += 1
        return True

    def lost(self, detail: str) -> PeerLost:
        return PeerLost(self.rank, self.expected.block, detail)


class TcpMesh:
    """`Mesh` over connected sockets, one for each peer. Made by `connect` or `local_mesh`."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        connections: Mapping[int, Stream | socket.socket],
        *,
        timeout: float = 30.0,
        handshake: Stats | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        streams = {
            peer: stream if isinstance(stream, Stream) else Stream(stream)
            for peer, stream in connections.items()
        }
        self._peers = {peer: _Peer(peer, stream) for peer, stream in streams.items()}
        self._by_fd = {peer.fd: peer for peer in self._peers.values()}
        self._sending = threading.Lock()  # a link emulator sends from a thread of its own
        self._poll = select.poll()
        self._handshake = handshake or Stats()
        self._closed = False
        # Ranks that share cores had better sleep: a yielded core can be gone for a time slice.
        self._may_yield = world_size <= len(os.sched_getaffinity(0))
        # Twice the deadline, so that a wait of ours ends first and can say whom it waited for.
        unacknowledged = min(math.ceil(2000 * timeout), 2**31 - 1)  # milliseconds
        for peer in self._peers.values():
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unacknowledged)
            self._poll.register(peer.fd, _ENDED)
            peer.watched = _ENDED

    @property
    def encrypted(self) -> bool:
        return bool(self._peers) and all(p.stream.encrypted for p in self._peers.values())

    @property
    def stats(self) -> Stats:
        return sum((peer.stats for peer in self._peers.values()), self._handshake)

    @property
    def peer_stats(self) -> dict[int, Stats]:
        return {rank: peer.stats + Stats() for rank, peer in self._peers.items()}

    def agree(self, facts: Mapping[str, str]) -> None:
        _mesh.agree(self, facts)

    def buffer(self, size: int) -> Frame:
        return Frame(size)

    def send(self, payload: Payload, *, block: int, plan: int, to: Sequence[int]) -> None:
        frame = payload if isinstance(payload, Frame) else Frame.of(payload)
        for rank in to:
            peer = self._peer(rank)
            if peer.unsent_bytes > MAX_UNSENT:
                self._flush([peer], block)
            with self._sending:
                data = frame.stamp(peer.sent, plan, block, self.rank)
                peer.sent += 1
                stats = peer.stats
                stats.messages_sent += 1
                if block < CONTROL_BLOCKS:
                    stats.bytes_sent_payload += frame.size
                else:
                    stats.bytes_sent_control += frame.size
                try:
                    peer.transmit(data)
                except OSError as error:
                    raise PeerLost(rank, block, error.strerror or str(error)) from error

    def receive(self, sizes: Mapping[int, int], *, block: int, plan: int) -> dict[int, memoryview]:
        waiting: dict[int, _Peer] = {}
        for rank, size in sizes.items():
            peer = self._peer(rank)
            peer.expect(size, block, plan)
            if not peer.advance():
                waiting[peer.fd] = peer
        if waiting:
            self._wait(waiting, block)
        views = {}
        for rank, size in sizes.items():
            peer = self._peers[rank]
            peer.stats.messages_received += 1
            if block < CONTROL_BLOCKS:
                peer.stats.bytes_received_payload += size
            else:
                peer.stats.bytes_received_control += size
            views[rank] = peer.frame[HEADER_SIZE:]
        return views

    def _wait(self, waiting: dict[int, _Peer], block: int) -> None:
        """Serves every socket until all frames in `waiting` are whole or the deadline passes."""
        deadline = time.monotonic() + self.timeout
        if self._may_yield:
            self._yield_for(waiting)
        for peer in self._peers.values():
            self._watch(peer, peer.fd in waiting)
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                ranks = tuple(sorted(peer.rank for peer in waiting.values()))
                raise DeadlineExceeded(ranks[0], block, self.timeout, ranks)
            for fd, events in self._poll.poll(math.ceil(left * 1000)):
                self._serve(self._by_fd[fd], events, waiting, block)

    def _yield_for(self, waiting: dict[int, _Peer]) -> None:
        """Most frames of an exchange come within microseconds: to give the core to whoever sends
        them is quicker than to sleep and be woken. Looking without yielding starves the senders."""
        until = time.perf_counter_ns() + YIELD_NANOSECONDS
        while waiting and time.perf_counter_ns() < until:
            os.sched_yield()
            for peer in list(waiting.values()):
                if peer.advance():
                    del waiting[peer.fd]

    def _serve(self, peer: _Peer, events: int, waiting: dict[int, _Peer], block: int) -> None:
        if events & select.POLLOUT:
            self._flush_now([peer], block)
        if peer.fd in waiting:
            if events & ~select.POLLOUT and peer.advance():
                del waiting[peer.fd]
        elif events & _ENDED:
            if not peer.stream.ended_properly(peer.rank):
                raise PeerLost(peer.rank, block, "it closed the connection")
            self._poll.unregister(peer.fd)  # what it sent before its BYE can still be read
            peer.watched = 0
            return
        self._watch(peer, peer.fd in waiting)

    def _watch(self, peer: _Peer, readable: bool) -> None:
        """Keeps frames that came early from waking this rank: only awaited data counts."""
        if not peer.watched:
            return
        events = _ENDED
        if readable:
            events |= select.POLLIN
        if peer.unsent:
            events |= select.POLLOUT
        if events != peer.watched:
            self._poll.modify(peer.fd, events)
            peer.watched = events

    def _peer(self, rank: int) -> _Peer:
        if self._closed:
            raise AstraError("the mesh is closed")
        peer = self._peers.get(rank)
        if peer is None:
            raise ValueError(f"rank: expected one of {sorted(self._peers)}, got {rank}")
        return peer

    def flush(self) -> None:
        self._flush(list(self._peers.values()), None)

    def _flush_now(self, peers: Sequence[_Peer], block: int | None) -> list[_Peer]:
        """Sends what the kernel takes; returns the peers with bytes left."""
        left = []
        with self._sending:
            for peer in peers:
                try:
                    if not peer.flush():
                        left.append(peer)
                except OSError as error:
                    raise PeerLost(peer.rank, block, error.strerror or str(error)) from error
        return left

    def _flush(self, peers: Sequence[_Peer], block: int | None) -> None:
        deadline = time.monotonic() + self.timeout
        while left := self._flush_now(peers, block):
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                ranks = tuple(sorted(peer.rank for peer in left))
                raise DeadlineExceeded(ranks[0], block, self.timeout, ranks)
            writable = select.poll()
            for peer in left:
                writable.register(peer.fd, select.POLLOUT)
            writable.poll(math.ceil(seconds * 1000))

    def close(self) -> None:
        self._close(say_bye=True)

    def _close(self, *, say_bye: bool) -> None:
        if self._closed:
            return
        self._closed = True
        if say_bye:
            for peer in self._peers.values():
                self._say_bye(peer)
        for peer in self._peers.values():
            peer.sock.close()

    def _say_bye(self, peer: _Peer) -> None:
        """Ends one connection so that nothing sent is lost: a close with unread input resets it,
        and a reset discards what the peer's kernel has not acknowledged yet."""
        try:
            with self._sending:
                peer.transmit(wire.bye(peer.sent, self.rank))
            self._flush([peer], None)
            peer.sock.shutdown(socket.SHUT_WR)
            self._drain(peer.sock)
        except (AstraError, OSError):
            return  # the peer is gone, and so is the need to take leave of it

    def _drain(self, sock: socket.socket) -> None:
        """Waits until the peer's kernel has acknowledged every byte, or is gone."""
        deadline = time.monotonic() + self.timeout
        pause = 1e-4
        while time.monotonic() < deadline:
            (left,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
            state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            if not left or state == _TCP_CLOSE:
                return
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A rank that fails must look lost to its peers, not finished.
        self._close(say_bye=kind is None)
