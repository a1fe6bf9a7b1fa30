"""An in-process link with a virtual clock, for more ranks than there are cores.

Ranks are threads of this process, and exactly one of them runs at a time, on one core with one
torch thread. What a rank computes is really executed and timed, so its clock advances by that; in
waiting it advances to the moment that the link (`model.Link`) says, and nobody sleeps. An
unmodified engine runs on a rank's `VirtualMesh`:

    def work(mesh: VirtualMesh) -> Lap:
        with Engine(model, codebook, mesh) as engine:      # all ranks share the model
            engine(input_ids=ids)                          # warm up
            mesh.start()                                   # every rank is here; time starts at 0
            engine(input_ids=ids)
            return mesh.lap()

    run = World(4, Link(10, rtt_ms=2)).run(work)
    max(lap.finish for lap in run.results)                 # seconds until all have finished

**Order.** A rank runs until it has to wait. Then the one goes on that can at the earliest virtual
time, so nothing can any more be sent before that time, and all that arrives by then is known: the
order in which threads run changes no result. Ranks are a process network (each waits for frames of
ranks that it names), so what they compute does not depend on times either.

**Compute time** is the thread's CPU time (`clock="cpu"`, CLOCK_THREAD_CPUTIME_ID): what other
programs take of the core is not charged, and with one torch thread operators run in their caller;
`Run.elsewhere` tells what ran in other threads and so was not timed. It is read twice a message,
about a microsecond each time. Waits for disks do not count; caches and clock rate that other
programs take away do, with either clock. `clock="wall"` is `perf_counter` while the rank holds the
core: the same on an idle machine. The mesh's own work here (queues, threads) is never charged. What
real sockets would cost the rank instead is `SocketCosts`.

**What flatters.** Ranks share the model's memory, so weights that the rank before has just read may
still be in the last-level cache; on devices of their own each reads them from memory. `cold_bytes`
overwrites that many bytes before a rank goes on (twice the last-level cache drives all of it out,
and with it what the rank had itself): the truth lies between the two. Memory bandwidth is not
shared as it is by ranks that really run side by side.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

import numpy as np
import torch

from astra_runtime.errors import AstraError, DeadlineExceeded, PeerLost
from astra_runtime.transport.lifetime import CLOSED, aborted_by
from astra_runtime.transport.mesh import Payload, refuse_partial
from astra_runtime.transport.peers import Channel, PeerMesh
from astra_runtime.wire import HEADER_SIZE, Frame
from bench.link.clock import Lap, Rank, SocketCosts, Span, State
from bench.link.model import Link
from bench.link.network import Message, Network

__all__ = ["Lap", "Run", "SocketCosts", "Span", "VirtualMesh", "World"]

T = TypeVar("T")
Clock = Literal["cpu", "wall"] | Callable[[], float]
_CLOCKS: Final[dict[str, Callable[[], float]]] = {
    "cpu": time.thread_time,
    "wall": time.perf_counter,
}


@dataclass(frozen=True)
class Run(Generic[T]):
    """A run of all ranks. `elsewhere`: CPU seconds of this process outside of ranks' threads."""

    results: list[T]
    laps: list[Lap]
    spans: list[Span]
    elsewhere: float


class _Aborted(BaseException):
    """Ends the ranks' threads when the caller of `run` was interrupted."""


class World:
    """N ranks on one core and a virtual network between them.

    Args:
        world_size: how many ranks; 1 has nobody to talk to.
        link: each rank's access link.
        speed: how many times faster than this core a device is: measured times are divided by it.
        clock: "cpu", "wall", or what a rank is to be timed by, in seconds.
        core: which core to run on; by default the last one that this process may use. None of the
            rest of this process is bound to it.
        costs: what real sockets would cost, charged for every message; nothing by default.
        cold_bytes: how much memory to overwrite whenever another rank goes on.
        spans: keep a timeline.
    """

    def __init__(
        self,
        world_size: int,
        link: Link,
        *,
        speed: float = 1.0,
        clock: Clock = "cpu",
        core: int | None = None,
        costs: SocketCosts | None = None,
        cold_bytes: int = 0,
        spans: bool = False,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size: expected at least 1, got {world_size}")
        if not 0 < speed < math.inf:
            raise ValueError(f"speed: expected a positive factor, got {speed}")
        if isinstance(clock, str) and clock not in _CLOCKS:
            raise ValueError(f"clock: expected one of {', '.join(_CLOCKS)}, got {clock!r}")
        self.world_size, self.link, self.speed = world_size, link, speed
        self.costs = costs or SocketCosts()
        self.network = Network(world_size, link)
        self._core = max(os.sched_getaffinity(0)) if core is None else core
        self._cold = np.zeros(cold_bytes, np.uint8)
        measure = _CLOCKS[clock] if isinstance(clock, str) else clock
        self._ranks = [Rank(n, measure, speed, spans) for n in range(world_size)]
        self._now = 0.0  # nothing is sent before this any more
        self._stuck = ""
        self._aborted = False
        self._used = False

    def run(self, work: Callable[[VirtualMesh], T]) -> Run[T]:
        """Calls `work` with each rank's mesh and returns when all have finished; once a world.

        Raises what the rank raised that failed first, in virtual time.
        """
        if self._used:
            raise RuntimeError("a world runs once: make another one")
        self._used = True
        threads_of_torch = torch.get_num_threads()
        results: list[Any] = [None] * self.world_size
        failures: list[tuple[float, int, BaseException]] = []
        timed = [0.0] * self.world_size

        def live(rank: Rank) -> None:
            rank.baton.acquire()
            os.sched_setaffinity(0, {self._core})  # 0: this thread
            torch.set_num_threads(1)
            try:
                with VirtualMesh(self, rank) as mesh:
                    rank.running, rank.mark = True, rank.measure()
                    self._go_on()
                    results[rank.index] = work(mesh)
            except BaseException as error:
                failures.append((rank.clock, len(failures), error))
            rank.running = False
            rank.state = State.ENDED
            timed[rank.index] = time.thread_time()
            following = self._choose()
            if following is not None:
                following.baton.release()

        threads = []
        for rank in self._ranks:
            rank.baton.acquire()
            name = f"rank {rank.index}"
            threads.append(threading.Thread(target=live, args=(rank,), name=name, daemon=True))
        before, own = time.process_time(), time.thread_time()
        for thread in threads:
            thread.start()
        try:
            self._ranks[0].baton.release()
            for thread in threads:
                thread.join()
        finally:
            self._aborted = True
            torch.set_num_threads(threads_of_torch)
        used = time.process_time() - before - (time.thread_time() - own)
        if failures:
            raise min(failures, key=lambda failure: failure[:2])[2]
        return Run(
            results,
            [rank.lap() for rank in self._ranks],
            [span for rank in self._ranks for span in rank.spans],
            max(0.0, used - sum(timed)),
        )

    # What follows runs on the thread of the rank that holds the baton.

    def _choose(self) -> Rank | None:
        """The rank that can go on first, and its time of waking."""
        living = [rank for rank in self._ranks if rank.state is not State.ENDED]
        if not living:
            return None
        if all(rank.state is State.STARTING for rank in self._ranks):
            self._restart()
        best = living[0]
        for rank in living:
            rank.wake = self._ready_at(rank)
            if rank.wake < best.wake:
                best = rank
        if best.wake == math.inf and not self._stuck:
            waits = ", ".join(f"rank {r.index} for {self._missing(r) or 'all'}" for r in living)
            self._stuck = f"every rank waits: {waits}"
        if best.wake < math.inf:
            self._now = max(self._now, best.wake)
        return best

    def _ready_at(self, rank: Rank) -> float:
        if rank.state is State.READY:
            return rank.clock
        if rank.state is State.STARTING:
            return math.inf
        missing = self._missing(rank)
        ended = [gone for n in missing if (gone := self._ranks[n].gone) is not None]
        if ended:
            wake = max(rank.clock, min(ended) + self.link.delay)
        elif missing:
            wake = math.inf
        else:
            wake = max(rank.clock, self._arrival(rank))
        return min(wake, rank.deadline)

    def _missing(self, rank: Rank) -> list[int]:
        """The ranks whose message `rank` waits for although it has not been sent."""
        return [n for n in rank.sources if self.network.first(rank.index, n) is None]

    def _arrival(self, rank: Rank) -> float:
        arrival = self.network.arrival
        return max((arrival(rank.index, n, self._now) for n in rank.sources), default=0.0)

    def _restart(self) -> None:
        """All links are idle, all that was sent has arrived, and all clocks say 0."""
        self.network.quiet(self._now)
        self._now = 0.0
        for rank in self._ranks:
            rank.state = State.READY
            rank.clock = rank.computing = rank.waiting = 0.0
            rank.spans.clear()

    def _pass_on(self, rank: Rank) -> None:
        """Lets the rank run that comes next, and returns when it is `rank`."""
        following = self._choose()
        if following is not rank:
            assert following is not None, "at least this rank lives"
            following.baton.release()
            rank.baton.acquire()
            if len(self._cold):
                self._cold += 1
        self._go_on()

    def _go_on(self) -> None:
        if self._aborted:
            raise _Aborted
        if self._stuck:
            raise AstraError(self._stuck)

    def post(self, rank: Rank, target: int, size: int, content: Any) -> None:
        """Sends a message of `size` bytes. `content` must not change any more."""
        cost = self.costs.send + self.costs.send_byte * size
        rank.advance(cost / self.speed, "send")
        self.network.send(rank.index, target, size, content, rank.clock)

    def await_from(
        self, rank: Rank, sources: Sequence[int], block: int | None, timeout: float = math.inf
    ) -> list[Message]:
        """The next message of each of `sources`; the clock then says when all were there."""
        rank.sources, rank.deadline = tuple(sources), rank.clock + timeout
        rank.state = State.RECEIVING
        self._pass_on(rank)
        rank.state = State.READY
        rank.wait_until(rank.wake)
        missing = self._missing(rank)
        lost = [n for n in missing if self._ranks[n].gone is not None]
        if lost and rank.clock < rank.deadline:
            raise PeerLost(lost[0], block, self._ranks[lost[0]].reason)
        late = missing or [
            n for n in sources if self.network.arrival(rank.index, n, self._now) > rank.clock
        ]
        if late:
            raise DeadlineExceeded(late[0], block, timeout, tuple(late))
        messages = [self.network.take(rank.index, n) for n in sources]
        size = sum(message.size for message in messages)
        cost = self.costs.receive * len(messages) + self.costs.receive_byte * size
        rank.advance(cost / self.speed, "receive")
        return messages

    def await_start(self, rank: Rank) -> None:
        rank.state = State.STARTING
        rank.sources = ()
        self._pass_on(rank)


class VirtualMesh(PeerMesh[Channel]):
    """A rank's `Mesh` on the virtual network, with the frames, checks and counts of `TcpMesh`.

    `timeout` is in virtual seconds, and there is none by default: to wait here costs nothing.
    """

    def __init__(self, world: World, rank: Rank) -> None:
        own, size = rank.index, world.world_size
        super().__init__(own, size, math.inf, (Channel(own, n) for n in range(size) if n != own))
        self.world = world
        self.state = rank

    @property
    def now(self) -> float:
        """This rank's clock, in virtual seconds."""
        self.state.read()
        return self.state.clock

    def start(self) -> None:
        """Collective: returns on all ranks at virtual time 0, with idle links and empty laps."""
        self._check_open()
        with self.state.off_clock():
            self.world.await_start(self.state)

    def lap(self) -> Lap:
        """This rank since the last start."""
        self.state.read()
        return self.state.lap()

    def spend(self, seconds: float, stage: str | None = None) -> None:
        """Computes for `seconds` without executing anything; `speed` does not shorten it."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds: expected 0 or more, got {seconds}")
        with self.state.off_clock():
            self.state.advance(seconds, stage or self.state.stages[-1])

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Names what is computed inside, for the timeline."""
        self.state.read()
        self.state.stages.append(name)
        try:
            yield
        finally:
            self.state.read()
            self.state.stages.pop()

    @property
    def encrypted(self) -> bool:
        """Whether the link counts TLS records; nothing is encrypted here, nor is that timed."""
        return self.world.link.tls

    def send(
        self, payload: Payload, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        refuse_partial(partial)
        self._check_open()
        frame = payload if isinstance(payload, Frame) else Frame.of(payload)
        with self.state.off_clock():
            for rank in to:
                channel = self._peer(rank)
                data = bytes(channel.stamp(frame, block, plan))
                channel.stats.bytes_sent_total += len(data)
                self.world.post(self.state, rank, len(data), data)

    def receive(
        self,
        sizes: Mapping[int, int],
        *,
        block: int,
        plan: int,
        timeout: float | None = None,
        partial: bool = False,
    ) -> dict[int, memoryview]:
        refuse_partial(partial)
        self._check_open()
        seconds = self.timeout if timeout is None else timeout
        channels = [self._peer(rank) for rank in sizes]
        with self.state.off_clock():
            messages = self.world.await_from(self.state, tuple(sizes), block, seconds)
            views = {}
            for channel, message in zip(channels, messages, strict=True):
                data = message.content
                channel.accept(data, sizes[channel.rank], block, plan)
                # a copy that may be written, as a socket's buffer may
                views[channel.rank] = memoryview(bytearray(data))[HEADER_SIZE:]
            return views

    def flush(self) -> None:
        """Waits until the last bit has left on the uplink."""
        self._check_open()
        with self.state.off_clock():
            self.state.wait_until(self.world.network.idle_until(self.rank), "flush")

    def close(self) -> None:
        """What was sent still arrives; a peer that waits for more loses this rank."""
        self._leave(CLOSED, "it had finished")

    def abort(self, error: BaseException) -> None:
        self._leave(aborted_by(error), f"it failed: {type(error).__name__}: {error}")

    def _leave(self, reason: str, of_peers: str) -> None:
        """`reason` is why this rank can do no more, `of_peers` why its peers lose it."""
        if self._lifetime.end(reason):
            self.state.read()
            self.state.gone, self.state.reason = self.state.clock, of_peers
