"""A full mesh over TCP: non-blocking sockets, one system call a frame, a deadline on every wait.

A frame leaves in `send` straight from its buffer. What the kernel does not take at once (more than
its send buffer, a slow reader) is copied and follows in later calls: while this rank waits in
`receive`, at its next `send`, in `flush` or `close`. Frames that come early stay in the kernel's
receive buffer until their block is asked for, so TCP's own flow control slows a rank far ahead.
Whether the bytes are encrypted on the way is the business of `stream.py`.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Mapping, Sequence
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
from astra_runtime.transport import last_words
from astra_runtime.transport import mesh as _mesh
from astra_runtime.transport.mesh import Mesh, Payload, Stats
from astra_runtime.transport.stream import Stream
from astra_runtime.wire import HEADER_SIZE, Frame, Header

SEND_BUFFER: Final = 2 << 20  # asked of the kernel: usual frames (≤128 KiB) leave in one call
MAX_UNSENT: Final = 64 << 20  # bytes kept for a peer that does not read before `send` waits
MAX_OWED: Final = 1 << 16  # frames that a peer may be behind before it is given up
ABORT_SECONDS: Final = 0.2  # for telling all peers why this rank fails
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
        self.named = 0  # frames that have to come or have come
        self.due: deque[Header] = deque()  # still to come; all but the last one are owed
        self.error: AstraError | None = None  # why it ended, as far as reading has found
        self.deaf = False  # it cannot be reached any more; what it sent can still be read
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self.watched = 0  # poll events registered
        self.slots = [memoryview(bytearray(HEADER_SIZE))] * 3  # even, odd, control
        self.frame = self.slots[0]
        self.filled = 0
        self.aborts = False  # what is being read is its ABORT
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
        self.due.append(Header(size, self.named, plan, block, self.rank))
        self.named += 1
        if len(self.due) == 1:
            self._begin()

    def _begin(self) -> None:
        size, _, _, block, _ = self.due[0]
        slot = block & 1 if block < CONTROL_BLOCKS else 2
        total = HEADER_SIZE + size
        if len(self.slots[slot]) < total:
            self.slots[slot] = memoryview(bytearray(total))
        self.frame = self.slots[slot][:total]
        self.filled = 0

    def advance(self) -> bool:
        """Reads what has come; True when all frames named so far are complete and correct.

        An owed frame is read like any other, into the memory of the one that replaces it.
        """
        while self.due:
            if not self._read():
                return False
            self.due.popleft()
            if self.due:
                self._begin()
        return True

    def _read(self) -> bool:
        """Reads what has come of the first frame due; True when it is complete and correct."""
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
            try:
                wire.check_header(self.frame, self.due[0])
            except WireError:
                if wire.is_bye(self.frame, self.rank):
                    raise self.lost("it had finished and said BYE") from None
                if not last_words.is_abort(self.frame, self.rank):
                    raise
                return self._hear_out()
        if filled < len(self.frame):
            return False
        if self.aborts:
            raise self._cause()
        return True

    def _hear_out(self) -> bool:
        """Goes on reading an ABORT, which has begun in place of the frame due."""
        whole = memoryview(bytearray(last_words.ABORT_SIZE))
        self.filled = min(self.filled, len(whole))
        whole[: self.filled] = self.frame[: self.filled]
        self.frame, self.aborts = whole, True
        if self.filled < len(whole):
            return self._read()
        raise self._cause()

    def _cause(self) -> AstraError:
        words, block = self.frame[HEADER_SIZE:], self.due[-1].block
        self.error = last_words.error_of(words, self.rank, block)
        return self.error

    def lost(self, detail: str) -> PeerLost:
        self.error = PeerLost(self.rank, self.due[-1].block, detail)
        return self.error

    def broken(self, block: int | None, error: OSError) -> AstraError:
        """Why nothing can be sent any more: what it said at the end, if that came."""
        found = last_words.ending(self.stream, self.rank, block, error.strerror or str(error))
        return found or PeerLost(self.rank, block, "it had finished and said BYE")

    def deafen(self) -> None:
        """Sends nothing any more, so that the peer sees an end and no frame without its rest."""
        self.deaf = True
        self.unsent.clear()
        self.unsent_bytes = 0
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)


class TcpMesh:
    """`Mesh` over connected sockets, one for each peer. Made by `connect` or `local_mesh`."""

    partial, lossy = True, False
    gaps: Final[Mapping[int, Sequence[tuple[int, int]]]] = {}  # frames come whole

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
        self._lost: dict[int, AstraError] = {}
        self._block: int | None = None  # of the last call
        self._closed = False
        self.again: Callable[[float | None], Mesh] | None = None
        # Ranks that share cores had better sleep: a yielded core can be gone for a time slice.
        self._may_yield = world_size <= len(os.sched_getaffinity(0))
        # Far behind the deadline, so that a wait of ours ends first and can say whom it waited for.
        unacknowledged = min(math.ceil(1000 * max(2 * timeout, timeout + 5)), 2**31 - 1)  # ms
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

    @property
    def lost(self) -> Mapping[int, AstraError]:
        return self._lost

    def agree(self, facts: Mapping[str, str]) -> None:
        _mesh.agree(self, facts)

    def buffer(self, size: int) -> Frame:
        return Frame(size)

    def send(
        self, payload: Payload, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        frame = payload if isinstance(payload, Frame) else Frame.of(payload)
        self._block = block
        for rank in to:
            peer = self._peer(rank)
            if partial and peer.unsent_bytes > MAX_UNSENT:
                peer.deafen()  # one that has not read for so long is not waited for
            if partial and peer.deaf:
                continue
            if peer.unsent_bytes > MAX_UNSENT:
                self._flush([peer], block, self.timeout)
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
                    if not partial:
                        raise peer.broken(block, error) from error
                    peer.deafen()

    def receive(
        self,
        sizes: Mapping[int, int],
        *,
        block: int,
        plan: int,
        timeout: float | None = None,
        partial: bool = False,
    ) -> dict[int, memoryview]:
        self._block = block
        waiting: dict[int, _Peer] = {}
        awaited: list[_Peer] = []
        for rank, size in sizes.items():
            peer = self._peer(rank)
            if rank in self._lost:
                if not partial:
                    raise self._lost[rank]
                continue
            peer.expect(size, block, plan)
            awaited.append(peer)
            if not self._advance(peer, partial):
                waiting[peer.fd] = peer
        if waiting:
            self._wait(waiting, block, self.timeout if timeout is None else timeout, partial)
        views = {}
        for peer in awaited:
            if peer.due or peer.error is not None:
                continue
            size = len(peer.frame) - HEADER_SIZE
            peer.stats.messages_received += 1
            if block < CONTROL_BLOCKS:
                peer.stats.bytes_received_payload += size
            else:
                peer.stats.bytes_received_control += size
            views[peer.rank] = peer.frame[HEADER_SIZE:]
        return views

    def _advance(self, peer: _Peer, partial: bool) -> bool:
        """Whether there is nothing left to wait for: all has come, or nothing more will."""
        try:
            done = peer.advance()
            while not done and not peer.watched:  # it has ended, and no event will tell of more
                done = peer.advance()
            return done
        except AstraError:
            if not partial or peer.error is None:  # a wrong frame is never left out in silence
                raise
            self._give_up(peer, peer.error)
            return True

    def _give_up(self, peer: _Peer, error: AstraError) -> None:
        peer.error = self._lost[peer.rank] = error
        peer.due.clear()
        peer.deafen()
        self._ignore(peer)

    def _ignore(self, peer: _Peer) -> None:
        if peer.watched:
            self._poll.unregister(peer.fd)
            peer.watched = 0

    def _wait(self, waiting: dict[int, _Peer], block: int, seconds: float, partial: bool) -> None:
        """Serves every socket until all frames in `waiting` are whole or the deadline passes."""
        deadline = time.monotonic() + seconds
        if self._may_yield:
            self._yield_for(waiting, partial)
        for peer in self._peers.values():
            self._watch(peer, peer.fd in waiting)
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                self._too_late(waiting, block, seconds, partial)
                return
            for fd, events in self._poll.poll(math.ceil(left * 1000)):
                self._serve(self._by_fd[fd], events, waiting, block, partial)

    def _too_late(
        self, waiting: dict[int, _Peer], block: int, seconds: float, partial: bool
    ) -> None:
        ranks = tuple(sorted(peer.rank for peer in waiting.values()))
        late = DeadlineExceeded(ranks[0], block, seconds, ranks)
        if not partial:
            raise late
        for peer in waiting.values():
            if len(peer.due) > MAX_OWED:
                self._give_up(peer, late)

    def _yield_for(self, waiting: dict[int, _Peer], partial: bool) -> None:
        """Most frames of an exchange come within microseconds: to give the core to whoever sends
        them is quicker than to sleep and be woken. Looking without yielding starves the senders."""
        until = time.perf_counter_ns() + YIELD_NANOSECONDS
        while waiting and time.perf_counter_ns() < until:
            os.sched_yield()
            for peer in list(waiting.values()):
                if self._advance(peer, partial):
                    del waiting[peer.fd]

    def _serve(
        self,
        peer: _Peer,
        events: int,
        waiting: dict[int, _Peer],
        block: int,
        partial: bool = False,
    ) -> None:
        if events & select.POLLOUT:
            self._flush_now([peer], block, partial)
        if peer.fd in waiting:
            if events & ~select.POLLOUT and self._advance(peer, partial):
                del waiting[peer.fd]
        elif events & _ENDED:
            # what it sent before can still be read, when that is wanted
            cause = None
            if not partial:
                detail = "it closed the connection"
                cause = last_words.ending(peer.stream, peer.rank, block, detail)
            if cause is not None:
                raise cause
            self._ignore(peer)
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
        self._flush(list(self._peers.values()), None, self.timeout)

    def _flush_now(
        self, peers: Sequence[_Peer], block: int | None, partial: bool = False
    ) -> list[_Peer]:
        """Sends what the kernel takes; returns the peers with bytes left."""
        left = []
        with self._sending:
            for peer in peers:
                try:
                    if not peer.flush():
                        left.append(peer)
                except OSError as error:
                    if not partial:
                        raise peer.broken(block, error) from error
                    peer.deafen()
        return left

    def _flush(self, peers: Sequence[_Peer], block: int | None, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while left := self._flush_now(peers, block):
            rest = deadline - time.monotonic()
            if rest <= 0:
                ranks = tuple(sorted(peer.rank for peer in left))
                raise DeadlineExceeded(ranks[0], block, seconds, ranks)
            writable = select.poll()
            for peer in left:
                writable.register(peer.fd, select.POLLOUT)
            writable.poll(math.ceil(rest * 1000))

    def close(self) -> None:
        """Every wait for a peer is a wait of its own, as long as any other."""
        if self._closed:
            return
        self._closed = True
        for peer in self._peers.values():
            if not peer.deaf:
                self._end(peer, wire.bye(peer.sent, self.rank), time.monotonic() + self.timeout)
        for peer in self._peers.values():
            peer.sock.close()

    def abort(self, error: BaseException) -> None:
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + ABORT_SECONDS
        reached = [peer for peer in self._peers.values() if not peer.deaf]
        for peer in reached:  # all hear it before any is waited for
            words = last_words.frame(error, sequence=peer.sent, source=self.rank, block=self._block)
            with self._sending, contextlib.suppress(OSError):
                peer.transmit(words)
                if not peer.unsent:
                    peer.sock.shutdown(socket.SHUT_WR)
        for peer in reached:
            self._end(peer, None, deadline)
        for peer in self._peers.values():
            peer.sock.close()

    def _end(self, peer: _Peer, last: memoryview | None, deadline: float) -> None:
        """Ends one connection so that nothing sent is lost: a close with unread input resets it,
        and a reset discards what the peer's kernel has not acknowledged yet."""
        try:
            if last is not None:
                with self._sending:
                    peer.transmit(last)
            self._flush([peer], None, max(0.0, deadline - time.monotonic()))
            peer.sock.shutdown(socket.SHUT_WR)
            self._drain(peer.sock, deadline)
        except (AstraError, OSError):
            return  # the peer is gone, and so is the need to take leave of it

    def _drain(self, sock: socket.socket, deadline: float) -> None:
        """Waits until the peer's kernel has acknowledged every byte, or is gone."""
        pause = 1e-4
        while time.monotonic() < deadline:
            (left,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
            state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            if not left or state == _TCP_CLOSE:
                return
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def reconnect(self, connect_timeout: float | None = None) -> Mesh:
        self.close()
        return _mesh.anew(self, connect_timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _mesh.leave(self, kind, error)
