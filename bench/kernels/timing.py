"""Times of calls on a device, all calls in turns so that a disturbance meets all of them.

On a GPU a sample lies between two events, and the calls in it are queued behind a kernel that only
waits: so what is timed is the device's work, without Python's. Three more times tell the rest:

    cold    the same with an L2 cache that was just overwritten
    graph   replays of a CUDA graph: what a decoder that captures its step pays
    eager   wall clock of calls one after the other: what calls cost from Python, launches included
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from bench.report import Times, measure, percentiles

Call = Callable[[], object]

SAMPLES = 30
LONG_MS, SAMPLES_OF_LONG = 20.0, 10  # so long that nothing disturbs it much
MOST_REPEATS, REPEATED_MS = 5, 0.1  # a sample repeats a short call
SHORT_MS = 2.0  # graph and eager times are taken up to here
LEAD = 1.5  # the waiting kernel waits so many times as long as queueing takes
MOST_LEAD_MS = 5.0


@dataclass(frozen=True)
class Measured:
    """Times of one call; `graph` and `eager` are missing where they say nothing or failed."""

    warm: Times
    cold: Times | None = None
    graph: Times | None = None
    eager: Times | None = None


def on_cpu(
    calls: Mapping[str, Call], *, seconds: float = 0.3, samples: int = 15
) -> dict[str, Measured]:
    times = measure(calls, seconds=seconds, samples=samples)
    return {name: Measured(taken) for name, taken in times.items()}


@dataclass
class Gpu:
    """Times calls on the current CUDA device."""

    samples: int = SAMPLES
    flushed: torch.Tensor = field(init=False, repr=False)
    cycles_per_ms: float = field(init=False)

    def __post_init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        cache = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        self.flushed = torch.empty(cache, dtype=torch.int32, device="cuda")  # 4 times it
        self.cycles_per_ms = 1e6  # a guess, to be replaced
        waits = [self._events(lambda: torch.cuda._sleep(2_000_000), 0.0, 1) for _ in range(5)]
        self.cycles_per_ms = 2_000_000 / statistics.median(waits)

    def measure(
        self, calls: Mapping[str, Call], not_captured: Collection[str] = ()
    ) -> dict[str, Measured]:
        plans = {name: self._plan(call) for name, call in calls.items()}
        most = max(milliseconds for _, milliseconds, _ in plans.values())
        samples = self.samples if most < LONG_MS else min(self.samples, SAMPLES_OF_LONG)
        graphs = {
            name: self._graph(call)
            for name, call in calls.items()
            if plans[name][1] < SHORT_MS and name not in not_captured
        }
        warm: dict[str, list[float]] = {name: [] for name in calls}
        cold: dict[str, list[float]] = {name: [] for name in calls}
        replayed: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(samples):
            for name, call in calls.items():
                repeats, _, lead = plans[name]
                call()  # whose data the cache then holds
                warm[name].append(self._events(call, lead * repeats, repeats))
                self.flushed.zero_()
                cold[name].append(self._events(call, lead, 1))
                graph = graphs.get(name)
                if graph is not None:
                    replayed[name].append(self._events(graph.replay, lead, 1) / MOST_REPEATS)
        short = [name for name, plan in plans.items() if plan[1] < SHORT_MS]
        eager = {name: self._eager(calls[name]) for name in short}
        return {
            name: Measured(
                percentiles(warm[name]),
                percentiles(cold[name]),
                percentiles(replayed[name]) if replayed[name] else None,
                eager.get(name),
            )
            for name in calls
        }

    def _plan(self, call: Call) -> tuple[int, float, float]:
        """How often a sample repeats the call, about how long it takes, how long to queue it."""
        for _ in range(3):
            call()
        queueing = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            queueing.append((time.perf_counter() - start) * 1e3)
        lead = min(statistics.median(queueing), MOST_LEAD_MS)
        once = min(self._events(call, lead, 1) for _ in range(3))
        return max(1, min(MOST_REPEATS, int(REPEATED_MS / max(once, 1e-3)))), once, lead

    def _events(self, call: Call, lead: float, repeats: int) -> float:
        """Milliseconds the device takes for one call; `lead`: to queue them all."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if lead:
            torch.cuda._sleep(int((LEAD * lead + 0.05) * self.cycles_per_ms))
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / repeats

    def _eager(self, call: Call) -> Times:
        taken = []
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                call()
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - start) * 1e2)
        return percentiles(taken)

    def _graph(self, call: Call) -> torch.cuda.CUDAGraph | None:
        """A graph of MOST_REPEATS calls, None where a call cannot be captured."""
        # torch.cuda.graph would collect garbage and empty the allocator's cache every time.
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                call()
                side.synchronize()
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    for _ in range(MOST_REPEATS):
                        call()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(side)
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError:  # a call that synchronizes, or allocates outside the pool
            self._end_failed_capture()
            return None
        return graph

    def _end_failed_capture(self) -> None:
        """torch's generator takes a capture that failed for one that goes on, and then refuses to
        make random numbers: a capture that succeeds ends it."""
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")
                self.flushed[:1].zero_()
                graph.capture_end()
            torch.cuda.synchronize()
