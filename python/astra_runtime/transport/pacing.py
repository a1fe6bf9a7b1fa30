"""Emulating a slow access link inside the sending process, exact below a packet, without credit.

Each rank has one full-duplex link of the stated rate. Every frame to every peer crosses the rank's
own uplink, one after another: it occupies the link for its bits over the rate and is delivered when
its last bit has crossed, plus the delay. A frame that finds the link busy waits; an idle link saves
nothing up, so no burst passes free. What is emulated is the uplink: N−1 senders that meet at one
rank's downlink are not slowed there (in an all-to-all exchange both directions carry the same
bytes). TCP acknowledgements are not counted.

The frame is held by a thread until the moment its last bit would have arrived and then goes through
the mesh below, loopback's few tens of microseconds late. The thread sleeps; computation continues.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from astra_runtime.control import Control
from astra_runtime.core import _C
from astra_runtime.errors import AstraError, DeadlineExceeded, anew
from astra_runtime.transport import abort
from astra_runtime.transport.buffers import BufferPool
from astra_runtime.transport.lifetime import CLOSED, aborted_by
from astra_runtime.transport.link import Link
from astra_runtime.transport.mesh import Mesh, MoreTime, Payload, peers_of
from astra_runtime.transport.stats import Stats
from astra_runtime.wire import NO_REQUEST, Frame

STOP_SECONDS: Final = 0.05  # for the thread to end
MAX_QUEUED: Final = 64 << 20  # payload bytes held back before `send` waits
_PR_SET_TIMERSLACK: Final = 29


class _Held(NamedTuple):
    """One frame on its way to one peer. `last`: the buffer is free once this one is sent."""

    due: float
    frame: Frame
    block: int
    plan: int
    rank: int
    partial: bool
    last: bool


class PacedMesh(Mesh):
    """A mesh whose sends cross `link` first. The payload is copied, so `send` returns at once."""

    def __init__(self, mesh: Mesh, link: Link) -> None:
        self._mesh = mesh
        self.link = link
        self.rank = mesh.rank
        self.world_size = mesh.world_size
        self.partial, self.lossy, self.store = mesh.partial, mesh.lossy, mesh.store
        self.resumes, self.call, self.request = mesh.resumes, mesh.call, mesh.request
        self.options = mesh.options
        self._busy_until = 0.0  # when the uplink has sent its last queued bit
        self._held: deque[_Held] = deque()
        self._held_bytes = 0
        self._pool = BufferPool(mesh.buffer)
        self._changed = threading.Condition()
        self._closing = False
        self._failure: AstraError | None = None
        self._thread = threading.Thread(target=self._deliver, name="astra-link", daemon=True)
        self._thread.start()

    @property
    def timeout(self) -> float:
        return self._mesh.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._mesh.timeout = seconds

    @property
    def keeper(self) -> _C.Keeper | None:
        return self._mesh.keeper

    @keeper.setter
    def keeper(self, keeper: _C.Keeper | None) -> None:
        self._mesh.keeper = keeper

    @property
    def more_time(self) -> MoreTime | None:
        return self._mesh.more_time

    @more_time.setter
    def more_time(self, asked: MoreTime | None) -> None:
        self._mesh.more_time = asked

    @property
    def encrypted(self) -> bool:
        return self._mesh.encrypted

    @property
    def stats(self) -> Stats:
        return self._mesh.stats

    @property
    def peer_stats(self) -> dict[int, Stats]:
        return self._mesh.peer_stats

    @property
    def ended(self) -> str | None:
        return self._mesh.ended

    @property
    def missing_ranges(self) -> Mapping[int, Sequence[tuple[int, int]]]:
        return self._mesh.missing_ranges

    @property
    def lost(self) -> Mapping[int, AstraError]:
        return self._mesh.lost

    def begin(self, request: int | None = None) -> None:
        self._mesh.begin(request)
        self.call, self.request = self._mesh.call, self._mesh.request

    def cancel(self, error: BaseException) -> None:
        """The cause crosses the link behind what was sent before."""
        if not self.resumes:
            self.abort(error)
            return
        payload = abort.encode_error(error, self.rank, None).payload
        with contextlib.suppress(AstraError):
            to, partial = peers_of(self), self.partial
            self.send(payload, block=Control.CANCEL, plan=0, to=to, partial=partial)
        self.end_early()

    def check_cancelled(self) -> None:
        self._mesh.check_cancelled()

    def interrupt(self, reason: str, call: int) -> None:
        self._mesh.interrupt(reason, call)

    def end_early(self) -> None:
        self._mesh.end_early()

    def alive(self) -> list[int]:
        return self._mesh.alive()

    def disconnected(self) -> list[int]:
        return self._mesh.disconnected()

    def buffer(self, size: int) -> Frame:
        return self._mesh.buffer(size)

    def send(
        self, payload: Payload, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        start = time.monotonic()
        self._raise_failure()
        content = payload.payload if isinstance(payload, Frame) else memoryview(payload).cast("B")
        size = content.nbytes
        crossing = self.link.seconds(size, encrypted=self.encrypted)
        with self._changed:
            if self._held_bytes > MAX_QUEUED:
                self._wait_for_room(block)
                start = time.monotonic()
            frame = self._pool.take(size)
            frame.payload[:] = content
            # calls may have begun on the mesh itself since the last one that crossed the link
            request = self._mesh.request
            frame.moment = (self._mesh.call, NO_REQUEST if request is None else request)
            for position, rank in enumerate(to, 1):
                self._busy_until = max(self._busy_until, start) + crossing
                due = self._busy_until + self.link.delay_ms * 1e-3
                self._held.append(
                    _Held(due, frame, block, plan, rank, partial, position == len(to))
                )
                self._held_bytes += size
            self._changed.notify_all()

    def _wait_for_room(self, block: int) -> None:
        if not self._changed.wait_for(
            lambda: self._held_bytes <= MAX_QUEUED or self._closing or self._failure is not None,
            self.timeout,
        ):
            raise DeadlineExceeded(self._held[0].rank, block, self.timeout)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._mesh.ended is not None:
            raise AstraError(self._mesh.ended)
        if self._failure is not None:
            raise anew(self._failure)
        if self._closing:
            raise AstraError(CLOSED)

    def _deliver(self) -> None:
        """The thread: sleeps until the first held frame has crossed, and hands it on."""
        _sharpen_timer()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._held or self._closing)
                if not self._held:
                    return
                held = self._held[0]
            pause = held.due - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            try:
                _, frame, block, plan, rank, partial, _ = held
                self._mesh.send(frame, block=block, plan=plan, to=(rank,), partial=partial)
                if not held.partial:  # else a peer that does not read would hold up the others
                    self._mesh.flush()
            except AstraError as error:
                self._fail(anew(error))
                return
            with self._changed:
                if not self._held:  # closed meanwhile without delivery
                    return
                self._held.popleft()
                self._held_bytes -= held.frame.size
                if held.last:
                    self._pool.give(held.frame, held.frame.size)
                self._changed.notify_all()

    def _fail(self, error: AstraError) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._held.clear()
            self._changed.notify_all()

    def receive(
        self,
        sizes: Mapping[int, int],
        *,
        block: int,
        plan: int,
        timeout: float | None = None,
        partial: bool = False,
    ) -> dict[int, memoryview]:
        self._raise_failure()
        return self._mesh.receive(sizes, block=block, plan=plan, timeout=timeout, partial=partial)

    def flush(self) -> None:
        """Waits until everything sent has crossed the link."""
        with self._changed:
            crossing = max(0.0, self._busy_until + self.link.delay_ms * 1e-3 - time.monotonic())
            if not self._changed.wait_for(
                lambda: not self._held or self._closing, crossing + self.timeout
            ):
                raise DeadlineExceeded(self._held[0].rank, None, self.timeout)
        self._raise_failure()

    def close(self) -> None:
        if self._mesh.ended is None:  # of a fork the thread and what its lock protects are no use
            # First, so that a call elsewhere names the end, not what delivery meets until then.
            self._failure = self._failure or AstraError(CLOSED)
            with contextlib.suppress(AstraError):
                self.flush()
            self._stop()
        self._mesh.close()
        self.store = None

    def abort(self, error: BaseException) -> None:
        if self._mesh.ended is None:
            self._failure = self._failure or AstraError(aborted_by(error))
            self._stop()
        self._mesh.abort(error)

    def _stop(self, seconds: float = STOP_SECONDS) -> None:
        """Has the thread end, without delivering what it still holds."""
        self._closing = True
        if self._changed.acquire(timeout=seconds):
            try:
                self._held.clear()
                self._changed.notify_all()
            finally:
                self._changed.release()
        if self._thread is not threading.current_thread():
            self._thread.join(seconds)


def _sharpen_timer() -> None:
    """Lets this thread wake on time: no timer slack (50 µs by default), and where the system allows
    it ahead of threads that compute. It runs for microseconds a frame, so it takes no core away."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # 0: the calling thread
