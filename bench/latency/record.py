"""Executes a method once on the virtual clock, and says how long it takes on any link.

What a rank computes between two messages takes as long whatever the link: so each rank's stages are
executed and timed once, with what it sent and waited for in between, and then played again on
every link of interest. Only waiting is computed (see `bench.link.virtual`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from astra_runtime import Codebook, Engine
from astra_runtime.trace import Trace, tracing
from bench.baselines import Method
from bench.latency.subjects import Subject
from bench.link.comm import VirtualComm
from bench.link.model import Link
from bench.link.virtual import Lap, SocketCosts, VirtualMesh, World

ANY = Link(100.0, rtt_ms=1.0)  # while executing; times on it are not looked at


class Event(NamedTuple):
    """`computed` seconds of work, then a message of `size` bytes to `to`, or a wait for `sources`.

    Neither: the end.
    """

    computed: float
    to: int = -1
    size: int = 0
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recording:
    """One pass of all ranks: their events; which of them has the answer, and its stages.

    Attributes:
        payload: bytes that ranks sent, for each token of the input; headers not counted.
        stages: seconds by stage, of the rank that is busy longest; empty for baselines.
        stages_of: the same of every rank.
    """

    ranks: list[list[Event]]
    answers: tuple[int, ...]
    payload: float
    stages: dict[str, float] = field(default_factory=dict)
    stages_of: tuple[dict[str, float], ...] = ()

    @property
    def computing(self) -> list[float]:
        return [sum(event.computed for event in events) for events in self.ranks]

    def scaled(self, factor: float) -> Recording:
        """The same pass, had everything computed taken `factor` times as long."""
        return replace(
            self,
            ranks=[[e._replace(computed=factor * e.computed) for e in rank] for rank in self.ranks],
            stages={name: factor * seconds for name, seconds in self.stages.items()},
            stages_of=tuple(
                {name: factor * seconds for name, seconds in stages.items()}
                for stages in self.stages_of
            ),
        )

    def finish(self, link: Link, costs: SocketCosts, speed: float = 1.0) -> float:
        """Seconds until the first rank has the answer, on devices `speed` times as fast."""
        if len(self.ranks) == 1:
            return self.computing[0] / speed
        laps = self.laps(link, costs, speed)
        return min(laps[n].finish for n in self.answers)

    def laps(self, link: Link, costs: SocketCosts, speed: float = 1.0) -> list[Lap]:
        """The same pass on that link, by rank; what sockets cost is in `computing`."""
        world = World(len(self.ranks), link, costs=costs, speed=speed, clock=lambda: 0.0)

        def work(mesh: VirtualMesh) -> Lap:
            for event in self.ranks[mesh.rank]:
                mesh.spend(event.computed / speed)
                with mesh.state.off_clock():
                    if event.to >= 0:
                        world.post(mesh.state, event.to, event.size, None)
                    elif event.sources:
                        world.await_from(mesh.state, event.sources, None)
            return mesh.lap()

        return world.run(work).results


class _Recorder(World):
    """A world that writes down what its ranks do since the last start."""

    def __init__(self, world_size: int, **options: Any) -> None:
        super().__init__(world_size, ANY, **options)
        self.events: list[list[Event]] = [[] for _ in range(world_size)]
        self._before = [0.0] * world_size

    def _restart(self) -> None:
        super()._restart()
        self.events = [[] for _ in range(self.world_size)]
        self._before = [0.0] * self.world_size

    def note(self, rank: Any, **what: Any) -> None:
        computed = rank.computing - self._before[rank.index]
        self._before[rank.index] = rank.computing
        self.events[rank.index].append(Event(computed, **what))

    def post(self, rank: Any, target: int, size: int, content: Any) -> None:
        self.note(rank, to=target, size=size)
        super().post(rank, target, size, content)

    def await_from(self, rank: Any, sources: Sequence[int], *args: Any, **options: Any) -> Any:
        if sources:
            self.note(rank, sources=tuple(sources))
        return super().await_from(rank, sources, *args, **options)


# One pass of one rank, to warm up or not: whether it has the answer.
Pass = Callable[[bool], bool]


def _execute(
    world_size: int,
    prepare: Callable[[VirtualMesh], tuple[Any, Pass, Callable[[], int]]],
    repeats: int,
    clock: Any,
) -> list[Recording]:
    """`repeats` passes after one to warm up, recorded.

    Args:
        prepare: makes, on each rank's thread, what is to be closed in the end, the pass, and a
            count of the payload bytes sent so far. The pass is told whether it is to warm up.
    """
    world = _Recorder(world_size, clock=clock)

    def work(mesh: VirtualMesh) -> list[tuple[list[Event], bool, int, dict[str, float]]]:
        closing, once, sent = prepare(mesh)
        passes = []
        try:
            for number in range(1 + repeats):
                mesh.start()
                before, trace = sent(), Trace(lambda: round(1e9 * mesh.now))
                with tracing(trace):
                    has = once(number == 0)
                with mesh.state.off_clock():
                    world.note(mesh.state)
                    # the end of the pass, before the next start empties the list
                    events = list(world.events[mesh.rank])
                passes.append((events, has, sent() - before, trace.seconds()))
        finally:
            if closing is not None:
                closing.close()
        return passes[1:]

    results = world.run(work).results
    recordings = []
    for passes in zip(*results, strict=True):
        events, has, sent, stages = map(list, zip(*passes, strict=True))
        busiest = max(range(world_size), key=lambda n: sum(e.computed for e in events[n]))
        answers = tuple(n for n in range(world_size) if has[n])
        for of_rank in stages:
            of_rank.pop("wait", None)  # of the link while executing
        own = stages[busiest] if any(stages[busiest].values()) else {}
        recordings.append(Recording(events, answers, sum(sent), own, tuple(stages)))
    return recordings


def astra(
    subject: Subject,
    codebook: Codebook,
    world_size: int,
    repeats: int,
    clock: Any = "cpu",
    shard_weights: Sequence[float] | None = None,
) -> list[Recording]:
    """The engine, with its own shards where no others are given."""

    def prepare(mesh: VirtualMesh) -> tuple[Engine, Pass, Callable[[], int]]:
        engine = Engine(subject.model, codebook, mesh, weights=shard_weights)

        def once(warm_up: bool) -> bool:
            inputs = subject.warm_up if warm_up else subject.inputs
            return engine(outputs="one", **inputs) is not None

        return engine, once, lambda: mesh.stats.bytes_sent_payload

    return _execute(world_size, prepare, repeats, clock)


def baseline(
    subject: Subject, method: Method, world_size: int, repeats: int, clock: Any = "cpu"
) -> list[Recording]:
    def prepare(mesh: VirtualMesh) -> tuple[None, Pass, Callable[[], int]]:
        comm = VirtualComm(mesh)

        def once(warm_up: bool) -> bool:
            inputs = subject.warm_up if warm_up else subject.inputs
            return method.run(subject.model, inputs, comm) is not None

        return None, once, lambda: comm.bytes_sent

    return _execute(world_size, prepare, repeats, clock)


def median_stages(recordings: Sequence[Recording]) -> dict[str, float]:
    """Milliseconds by stage."""
    names = recordings[0].stages
    return {
        name: 1e3 * statistics.median(recording.stages[name] for recording in recordings)
        for name in names
    }
