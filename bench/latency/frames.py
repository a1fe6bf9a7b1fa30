"""A steady stream of pictures over two processes, beside one device, and what the tail is made of.

    python -m bench.latency.frames [--frames 1000] [--ranks 2] [--mbit 10] [--rtt-ms 2]

Each rank is a process with one thread, on a core of its own; the sender paces its frames. Both are
given the same picture at the same scheduled moment. In turns, `--every` pictures are read by all
ranks (ASTRA), and one by rank 0 alone, at a steady rate: a turn lasts `SPARE` times as long as such
a picture takes at first. A picture's time is from its scheduled moment until rank 0 has the answer,
so that one that takes too long makes the next one late, too.

Of each picture a rank notes how late it began, and within its call: processor time of the thread
(`cpu`), waiting for other ranks (`wait`), the rest (`away`: it wanted its core and did not have
it), garbage collections, page faults and involuntary context switches. As the kernel counts them:
how long the thread was ready to run and did not (`queued`), and what the hypervisor took of the
core (`steal`, to 10 ms). Writes latency_frames.json: the percentiles, and the means over the
slowest hundredth beside those over all. `slowest` has these pictures one by one, with the stages of
rank 0. `tail_over_single` is p99 over p50, over the same of one device.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astra_runtime import Engine
from astra_runtime.contention import stolen_seconds
from astra_runtime.trace import Trace, tracing
from astra_runtime.transport import Mesh, peers_of
from astra_runtime.transport.messages import receive_json, send_json
from bench.latency.processes import RankSettings, parser_of, rank_of, run, shape_of
from bench.latency.subjects import Subject
from bench.link.rank import begin
from bench.report import Case, percentiles

WARM_UP = 5  # of each kind, before the rate is chosen
SPARE = 1.2
AHEAD = 0.2  # seconds from the choice to the first picture
# Of a picture's time on one rank, in ms.
PARTS = ("late", "cpu", "wait", "away", "gc", "queued", "steal")
SCHEDULED = Path("/proc/thread-self/schedstat")
TURNS = (0xFFE2, 0xFFE3)  # control numbers that the engine does not use
COUNTS = ("faults", "major_faults", "preempted")
Noted = dict[str, Any]  # of one picture on one rank


@dataclass(frozen=True)
class Settings(RankSettings):
    frames: int = 1000
    every: int = 2


class Collections:
    """Seconds that this process has spent in garbage collections."""

    def __init__(self) -> None:
        self.seconds = self._begun = 0.0

    def __call__(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._begun = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self._begun


@contextmanager
def collections() -> Iterator[Collections]:
    counted = Collections()
    gc.callbacks.append(counted)
    try:
        yield counted
    finally:
        gc.callbacks.remove(counted)


def rank_main(setup: Settings) -> dict[str, list[Noted]]:
    """What this rank notes of each picture, by who reads it."""
    with rank_of(setup, setup.tokens) as (subject, mesh, engine), collections() as counted:
        ways = {"astra": _all_ranks(engine, subject), "single": _one_rank(engine, subject)}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(WARM_UP):
            for name, way in ways.items():
                moment = begin(mesh)
                way()
                taken[name].append(time.monotonic() - moment)
        lasts = _agreed(mesh, {name: SPARE * statistics.median(t) for name, t in taken.items()})
        noted: dict[str, list[Noted]] = {name: [] for name in ways}
        moment = begin(mesh) + AHEAD
        for number in range(setup.frames):
            alone = ["single"] if number % setup.every == setup.every - 1 else []
            for name in ("astra", *alone):
                noted[name].append(_noted(ways[name], moment, counted))
                moment += lasts[name]
    return noted


def _all_ranks(engine: Engine, subject: Subject) -> Callable[[], object]:
    return lambda: engine(outputs="one", **subject.inputs)


def _one_rank(engine: Engine, subject: Subject) -> Callable[[], object]:
    """The same model on rank 0 alone; the others do nothing."""

    def read() -> object:
        with engine.calling():
            return subject.model(**subject.inputs)

    return read if engine.rank == 0 else lambda: None


def _agreed(mesh: Mesh, lasts: dict[str, float]) -> dict[str, float]:
    """Seconds that a turn lasts, as rank 0 says."""
    if mesh.rank == 0:
        send_json(mesh, lasts, blocks=TURNS, to=peers_of(mesh))
        return lasts
    return dict(receive_json(mesh, 0, blocks=TURNS, limit=1 << 10, what="turns"))


def _noted(way: Callable[[], object], moment: float, counted: Collections) -> Noted:
    """Reads a picture at its moment, or at once where that has passed."""
    time.sleep(max(0.0, moment - time.monotonic()))
    trace = Trace()
    core = _of_the_kernel()
    collected, before = counted.seconds, resource.getrusage(resource.RUSAGE_THREAD)
    cpu, start = time.thread_time(), time.monotonic()
    with tracing(trace):
        way()
    stop, cpu = time.monotonic(), time.thread_time() - cpu
    after = resource.getrusage(resource.RUSAGE_THREAD)
    queued, steal = (now - then for now, then in zip(_of_the_kernel(), core, strict=True))
    stages = {name: 1e3 * seconds for name, seconds in trace.seconds().items()}
    wait = stages.get("wait", 0.0)
    return {
        "ms": 1e3 * (stop - moment),
        "late": 1e3 * max(0.0, start - moment),
        "cpu": 1e3 * cpu,
        "wait": wait,
        "away": max(0.0, 1e3 * (stop - start - cpu) - wait),
        "gc": 1e3 * (counted.seconds - collected),
        "queued": queued,
        "steal": steal,
        "faults": after.ru_minflt - before.ru_minflt,
        "major_faults": after.ru_majflt - before.ru_majflt,
        "preempted": after.ru_nivcsw - before.ru_nivcsw,
        "stages": stages,
    }


def _of_the_kernel() -> tuple[float, float]:
    """Milliseconds so far: that this thread was ready and did not run, and that the hypervisor took
    of the cores that it may use; zeros where the kernel does not say."""
    queued = float(SCHEDULED.read_text().split()[1]) / 1e6 if SCHEDULED.is_file() else 0.0
    return queued, 1e3 * stolen_seconds()


def quantile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def cases_of(setup: Settings, of_ranks: list[dict[str, list[Noted]]]) -> list[Case]:
    shape = shape_of(setup, len(of_ranks))
    p50 = {name: quantile(_times(of_ranks, name), 0.5) for name in of_ranks[0]}
    cases = []
    for name, label in (("astra", f"astra {setup.codes}"), ("single", "one device")):
        times = _times(of_ranks, name)
        added = {f"p{share:g}_ms": quantile(times, share / 100) for share in (95, 99, 99.9)}
        added |= {"max_ms": times[-1], "pictures": len(times), **_tail(of_ranks, name)}
        added["p99_over_p50"] = added["p99_ms"] / p50[name]
        peers = {"single": p50["single"]} if name == "astra" else {}
        if name == "astra":
            alone = quantile(_times(of_ranks, "single"), 0.99) / p50["single"]
            added["tail_over_single"] = added["p99_over_p50"] / alone
        ms = percentiles(times)
        cases.append(Case("frames", shape, "float32", label, ms, peers=peers, extra=added))
    return cases


def _times(of_ranks: list[dict[str, list[Noted]]], name: str) -> list[float]:
    return sorted(noted["ms"] for noted in of_ranks[0][name])


def _tail(of_ranks: list[dict[str, list[Noted]]], name: str) -> dict[str, Any]:
    """Means over the slowest hundredth and over all pictures, by rank; and these, one by one."""
    first = of_ranks[0][name]
    order = sorted(range(len(first)), key=lambda n: -first[n]["ms"])
    slowest = order[: max(1, len(order) // 100)]
    return {
        "tail_ms": [_means([of_rank[name][n] for n in slowest]) for of_rank in of_ranks],
        "mean_ms": [_means(of_rank[name]) for of_rank in of_ranks],
        "slowest": [{"picture": n, **first[n]} for n in slowest],
    }


def _means(noted: Sequence[Noted]) -> dict[str, float]:
    keys = ("ms", *PARTS, *COUNTS)
    return {key: statistics.fmean(one[key] for one in noted) for key in keys}


def main(arguments: Sequence[str] | None = None) -> None:
    about, module = (__doc__ or "").splitlines()[0], "bench.latency.frames"
    parser = parser_of(module, about, rtt_ms=2.0, name="latency_frames")
    parser.set_defaults(model="vit-base", tokens=196, codes="hidden:1")
    parser.add_argument("--frames", type=int, default=1000, help="pictures for all ranks")
    parser.add_argument("--every", type=int, default=2, help="of them, before one for rank 0 alone")
    run(parser, arguments, Settings, rank_main, cases_of)


if __name__ == "__main__":
    main()
