"""A full mesh over TCP: non-blocking sockets, one system call a frame, a deadline on every wait.

A frame leaves in `send` straight from its buffer. What the kernel does not take at once (more than
its send buffer, a slow reader) is copied and follows in later calls: while this rank waits in
`receive`, at its next `send`, in `flush` or `close`. Whose turn it is is decided here; what is
written and read is the business of `connection.py`, whether it is encrypted that of `stream.py`.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from astra_runtime import wire
from astra_runtime.control import Control, is_of_a_call
from astra_runtime.errors import AstraError, CallEnded, DeadlineExceeded, anew
from astra_runtime.transport import abort
from astra_runtime.transport.closing import answers, deliver, shut_down
from astra_runtime.transport.connection import Connection
from astra_runtime.transport.lifetime import CLOSED, Interrupt, Lifetime, WriteTurn, aborted_by
from astra_runtime.transport.mesh import Payload
from astra_runtime.transport.peers import PeerMesh
from astra_runtime.transport.sockets import milliseconds
from astra_runtime.transport.stats import Stats
from astra_runtime.transport.stream import Stream
from astra_runtime.wire import HEADER_SIZE, Frame

MAX_UNSENT: Final = 64 << 20  # bytes kept for a peer that does not read before `send` waits
MAX_OUTSTANDING: Final = 1 << 16  # frames that a peer may be behind before it is given up
ABORT_SECONDS: Final = 0.2  # for telling all peers why this rank fails
YIELD_NANOSECONDS: Final = 20_000  # how long a wait yields its core before it sleeps
_ENDED: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class TcpMesh(PeerMesh[Connection]):
    """`Mesh` over connected sockets, one for each peer. Made by `connect` or `local_mesh`.

    Attributes:
        block: that of the last call, for this rank's abort frame.
        may_yield: whether each rank may have a core of its own here, so that a wait may yield its
            core for a moment. Ranks that share cores had better sleep: a yielded core can be gone
            for a time slice.
    """

    partial, resumes = True, True

    def __init__(
        self,
        rank: int,
        world_size: int,
        connections: Mapping[int, Stream | socket.socket],
        *,
        timeout: float = 30.0,
        handshake: Stats | None = None,
    ) -> None:
        streams = {
            peer: stream if isinstance(stream, Stream) else Stream(stream)
            for peer, stream in connections.items()
        }
        peers = (Connection(rank, peer, stream) for peer, stream in streams.items())
        super().__init__(rank, world_size, timeout, peers)
        self._by_fd = {peer.fd: peer for peer in self._peers.values()}
        self._turn = WriteTurn()  # a link emulator sends from a thread of its own
        # of closes and aborts, of which the first to come counts; appending needs no lock
        self._end_deadlines: list[float] = []
        self._poll = select.poll()
        self._poll.register(self._lifetime.wake, select.POLLIN)
        self._handshake = handshake or Stats()
        self._lost: dict[int, AstraError] = {}
        self._interrupt = Interrupt()
        self._poll.register(self._interrupt.fd, select.POLLIN)
        self._lifetime.resources.append(self._interrupt)
        self.block: int | None = None
        self.may_yield = world_size <= len(os.sched_getaffinity(0))
        # Far behind the deadline, so that a wait of ours ends first and can say whom it waited for.
        unacknowledged = min(math.ceil(1000 * max(2 * timeout, timeout + 5)), 2**31 - 1)  # ms
        for peer in self._peers.values():
            peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unacknowledged)
            self._poll.register(peer.fd, _ENDED)
            peer.watched = _ENDED
            self._lifetime.resources.append(peer.sock)

    @property
    def lifetime(self) -> Lifetime:
        return self._lifetime

    @property
    def connections(self) -> Mapping[int, Connection]:
        return self._peers

    @property
    def encrypted(self) -> bool:
        return bool(self._peers) and all(p.stream.encrypted for p in self._peers.values())

    @property
    def stats(self) -> Stats:
        return super().stats + self._handshake

    @property
    def lost(self) -> Mapping[int, AstraError]:
        return self._lost

    def alive(self) -> list[int]:
        try:
            with self._lifetime:
                ended = self._ended_peers()
                peers = [peer for peer in self._peers.values() if peer.rank not in ended]
                ranks = [peer.rank for peer in peers if answers(peer.sock)]
        except AstraError:
            ranks = []
        return sorted([self.rank, *ranks])

    def disconnected(self) -> list[int]:
        try:
            with self._lifetime:
                return sorted(self._ended_peers())
        except AstraError:
            return sorted(self._peers)

    def _ended_peers(self) -> set[int]:
        """The ranks whose connections have ended, as far as the kernel knows at the moment."""
        events = select.poll()
        for peer in self._peers.values():
            events.register(peer.fd, _ENDED)
        ended = {self._by_fd[fd].rank for fd, _ in events.poll(0)}
        return ended | self._lost.keys()

    def send(
        self, payload: Payload, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        frame = payload if isinstance(payload, Frame) else Frame.of(payload)
        with self._lifetime:
            self.block = block
            peers = [self._peers.get(rank) or self._peer(rank) for rank in to]
            if partial or any(peer.unsent_bytes > MAX_UNSENT for peer in peers):
                for peer in peers:
                    self._send(peer, frame, block, plan, partial)
                return
            with self._turn:
                for peer in peers:
                    self._write(peer, frame, block, plan)

    def _send(self, peer: Connection, frame: Frame, block: int, plan: int, partial: bool) -> None:
        if partial and peer.unsent_bytes > MAX_UNSENT:
            peer.close_send_side()  # one that has not read for so long is not waited for
        if partial and peer.send_closed:
            return
        if peer.unsent_bytes > MAX_UNSENT:
            self._flush([peer], block, self.timeout)
        with self._turn:
            self._write(peer, frame, block, plan, partial)

    def _write(
        self, peer: Connection, frame: Frame, block: int, plan: int, partial: bool = False
    ) -> None:
        self._lifetime.check()
        data = peer.stamp(frame, block, plan)
        try:
            peer.transmit(data)
        except OSError as error:
            if not partial:
                raise peer.broken(block, error) from error
            peer.close_send_side()

    def receive(
        self,
        sizes: Mapping[int, int],
        *,
        block: int,
        plan: int,
        timeout: float | None = None,
        partial: bool = False,
    ) -> dict[int, memoryview]:
        with self._lifetime:
            return self._receive(
                sizes, block, plan, self.timeout if timeout is None else timeout, partial
            )

    def _receive(
        self, sizes: Mapping[int, int], block: int, plan: int, seconds: float, partial: bool
    ) -> dict[int, memoryview]:
        self.block = block
        waiting: dict[int, Connection] = {}
        awaited: list[Connection] = []
        for rank, size in sizes.items():
            peer = self._peers.get(rank) or self._peer(rank)
            if rank in self._lost:
                if not partial:
                    raise anew(self._lost[rank])
                continue
            peer.expect(size, block, plan)
            awaited.append(peer)
            if not self._advance(peer, partial):
                waiting[peer.fd] = peer
        if waiting:
            self._wait(waiting, block, seconds, partial)
        views = {}
        for peer in awaited:
            if peer.outstanding or peer.error is not None:
                continue
            views[peer.rank] = payload = peer.frame[HEADER_SIZE:]
            peer.stats.count_received(len(payload), block)
        return views

    def _advance(self, peer: Connection, partial: bool) -> bool:
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

    def _give_up(self, peer: Connection, error: AstraError) -> None:
        peer.error = self._lost[peer.rank] = error
        peer.outstanding.clear()
        peer.close_send_side()
        self._ignore(peer)

    def _ignore(self, peer: Connection) -> None:
        if peer.watched:
            self._poll.unregister(peer.fd)
            peer.watched = 0

    def _wait(
        self, waiting: dict[int, Connection], block: int, seconds: float, partial: bool
    ) -> None:
        """Serves every socket until all frames in `waiting` are whole or the deadline passes."""
        deadline = time.monotonic() + seconds
        self._check_interrupt(block)
        if self.may_yield:
            self._yield_for(waiting, block, partial)
        for peer in self._peers.values():
            self._watch(peer, peer.fd in waiting)
        late = False
        while waiting:
            left = deadline - time.monotonic()
            if late and left <= 0:
                more = 0.0 if partial else self._more_time(waiting, seconds)
                if more <= 0:
                    self._too_late(waiting, block, seconds, partial)
                    return
                seconds, deadline = seconds + more, deadline + more
                left = deadline - time.monotonic()
            # this rank, too, may have been without a core: what came meanwhile is looked at first
            late = left <= 0
            for fd, events in self._poll.poll(milliseconds(left)):
                self._lifetime.check()
                if fd != self._interrupt.fd:
                    self._serve(self._by_fd[fd], events, waiting, block, partial)
                else:
                    self._check_interrupt(block)

    def _more_time(self, waiting: Mapping[int, Connection], waited: float) -> float:
        if self.more_time is None:
            return 0.0
        return self.more_time(tuple(sorted(peer.rank for peer in waiting.values())), waited)

    def _too_late(
        self, waiting: dict[int, Connection], block: int, seconds: float, partial: bool
    ) -> None:
        ranks = tuple(sorted(peer.rank for peer in waiting.values()))
        late = DeadlineExceeded(ranks[0], block, seconds, ranks)
        if not partial:
            raise anew(late)
        for peer in waiting.values():
            if len(peer.outstanding) > MAX_OUTSTANDING:
                self._give_up(peer, late)

    def _yield_for(self, waiting: dict[int, Connection], block: int, partial: bool) -> None:
        """Most frames of an exchange come within microseconds: to give the core to whoever sends
        them is quicker than to sleep and be woken. Looking without yielding starves the senders."""
        until = time.perf_counter_ns() + YIELD_NANOSECONDS
        while waiting and time.perf_counter_ns() < until:
            os.sched_yield()
            self._lifetime.check()
            self._check_interrupt(block)
            for peer in list(waiting.values()):
                if self._advance(peer, partial):
                    del waiting[peer.fd]

    def attend(
        self, others: Mapping[int, int], seconds: float, block: int, partial: bool
    ) -> tuple[list[int], list[Connection]]:
        """Waits for events at `others` (descriptor → poll events) or at connections of which
        nothing is awaited, and serves those.

        Returns which of `others` had events, and which connections ended; unless `partial`, one
        that ended without BYE raises.
        """
        for peer in self._peers.values():
            self._watch(peer, False)
        for fd, events in others.items():
            self._poll.register(fd, events)
        try:
            ready_now = self._poll.poll(milliseconds(seconds))
        finally:
            for fd in others:
                self._poll.unregister(fd)
        self._lifetime.check()
        self._check_interrupt(block)
        ready: list[int] = []
        ended: list[Connection] = []
        for fd, events in ready_now:
            if fd in others or fd == self._interrupt.fd:
                ready.extend({fd} & others.keys())
                continue
            self._serve(self._by_fd[fd], events, {}, block, partial)
            if events & _ENDED:
                ended.append(self._by_fd[fd])
        return ready, ended

    def _serve(
        self,
        peer: Connection,
        events: int,
        waiting: dict[int, Connection],
        block: int,
        partial: bool,
    ) -> None:
        awaited = peer.fd in waiting
        if events & select.POLLOUT:
            self._flush_now([peer], block, partial)
        if awaited:
            if events & ~select.POLLOUT and self._advance(peer, partial):
                del waiting[peer.fd]
        elif events & _ENDED:
            # what it sent before can still be read, when that is wanted
            cause = None
            if not partial:
                detail = "it closed the connection"
                cause = abort.error_at_end(peer.stream, peer.rank, block, detail, peer.unread)
            if cause is not None:
                raise anew(cause)
            self._ignore(peer)
        # who was awaited most likely is so in the next block, too
        self._watch(peer, awaited)

    def _watch(self, peer: Connection, readable: bool) -> None:
        """Keeps frames that came early from waking this rank more than once a wait: only awaited
        data counts."""
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

    def flush(self) -> None:
        with self._lifetime:
            self._flush(list(self._peers.values()), None, self.timeout)

    def _flush_now(
        self, peers: Sequence[Connection], block: int | None, partial: bool = False
    ) -> list[Connection]:
        """Sends what the kernel takes; returns the peers with bytes left."""
        left = []
        with self._turn:
            for peer in peers:
                try:
                    if not peer.flush():
                        left.append(peer)
                except OSError as error:
                    if not partial:
                        raise peer.broken(block, error) from error
                    peer.close_send_side()
        return left

    def _flush(self, peers: Sequence[Connection], block: int | None, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while left := self._flush_now(peers, block):
            rest = deadline - time.monotonic()
            if rest <= 0:
                ranks = tuple(sorted(peer.rank for peer in left))
                raise DeadlineExceeded(ranks[0], block, seconds, ranks)
            writable = select.poll()
            writable.register(self._lifetime.wake, select.POLLIN)
            for peer in left:
                writable.register(peer.fd, select.POLLOUT)
            writable.poll(milliseconds(rest))
            self._lifetime.check()

    def close(self) -> None:
        """Waits for all peers together as long as for a frame, and only some seconds for one whose
        kernel answers no more."""
        self._end(CLOSED, lambda peer: wire.bye(peer.num_sent, self.rank), self.timeout)

    def begin(self, request: int | None = None) -> None:
        super().begin(request)
        self._interrupt.clear()

    def interrupt(self, reason: str, call: int) -> None:
        self._interrupt.set(reason, call)

    def _check_interrupt(self, block: int) -> None:
        interrupt = self._interrupt
        if interrupt.reason is not None and is_of_a_call(block) and interrupt.call == self.call:
            raise CallEnded(self.rank, interrupt.reason)

    def check_cancelled(self) -> None:
        with self._lifetime:
            for peer in self._peers.values():
                if peer.error is None:
                    peer.check_cancelled()

    def cancel(self, error: BaseException) -> None:
        if self.ended is not None:
            return
        frame = abort.encode_error(error, self.rank, self.block)
        for peer in self._peers.values():
            with contextlib.suppress(AstraError, OSError):
                self._send(peer, frame, Control.CANCEL, 0, True)
        self.end_early()

    def end_early(self) -> None:
        """The call that runs is over on this rank, before all of its frames have arrived."""
        for peer in self._peers.values():
            peer.expect_nothing()

    def abort(self, error: BaseException) -> None:
        def frame(peer: Connection) -> memoryview:
            return abort.abort_frame(
                error, sequence=peer.num_sent, source=self.rank, block=self.block
            )

        self._end(aborted_by(error), frame, ABORT_SECONDS)

    def _end(
        self, reason: str, last_frame: Callable[[Connection], memoryview], seconds: float
    ) -> None:
        first = self._lifetime.end(reason)
        # an abort need not wait for a close in another thread, nor in what a signal interrupted
        self._end_deadlines.append(time.monotonic() + seconds)
        if first and not self._turn.defer(lambda: self._take_leave(last_frame)):
            self._take_leave(last_frame)

    def _take_leave(self, last_frame: Callable[[Connection], memoryview]) -> None:
        reached = []
        try:
            with self._turn.within(min(self._end_deadlines) - time.monotonic()) as taken:
                for peer in self._peers.values() if taken else ():
                    # where an exception has cut a frame short, a further one would be taken for it
                    if peer.send_closed or peer.writing:
                        continue
                    with contextlib.suppress(OSError):  # the peer is gone
                        peer.transmit(last_frame(peer))
                        reached.append(peer)
            deliver(reached, self._turn, lambda: min(self._end_deadlines))
        finally:
            shut_down(self._peers.values())
            self._lifetime.finish()
