"""Where a run's time goes: a timeline for chrome://tracing or ui.perfetto.dev, one row a rank.

Code on the hot path says what it is doing with `stage`, which costs a third of a microsecond where
nobody listens. Inside `tracing`, the stages of this thread are kept in a `Trace`. Stages nest: the
time of the model's own work, "compute", is what no other stage in it takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any

STAGES = ("compute", "encode", "pack", "send", "wait", "unpack", "attend", "merge")
Span = tuple[str, int, int, int]  # stage, block or −1, start and stop in ns


class Trace:
    """The stages of one rank, in the order in which they ended. `clock` gives nanoseconds."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.clock = clock
        self.spans: list[Span] = []

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, each without the stages inside it; all of `STAGES`."""
        return exclusive(self.spans)


class _Stage:
    __slots__ = ("block", "name", "start", "trace")

    def __init__(self, trace: Trace, name: str, block: int) -> None:
        self.trace, self.name, self.block = trace, name, block

    def __enter__(self) -> None:
        self.start = self.trace.clock()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stop = self.trace.clock()
        self.trace.spans.append((self.name, self.block, self.start, stop))


_current: ContextVar[Trace | None] = ContextVar("astra_trace", default=None)
_NOBODY = contextlib.nullcontext()


def stage(name: str, block: int = -1) -> contextlib.AbstractContextManager[None]:
    """`with stage("encode", block):` — what this thread does, if anybody wants to know."""
    trace = _current.get()
    return _NOBODY if trace is None else _Stage(trace, name, block)


@contextlib.contextmanager
def tracing(trace: Trace | None) -> Iterator[None]:
    """Keeps this thread's stages in `trace`; None: does nothing."""
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)


def exclusive(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by stage, each without the stages inside it."""
    found = dict.fromkeys(STAGES, 0.0)
    # a span lies within the last one that began before it and has not ended
    open_spans: list[Span] = []
    for span in sorted(spans, key=lambda span: (span[2], -span[3])):
        name, _, start, stop = span
        while open_spans and open_spans[-1][3] <= start:
            open_spans.pop()
        if open_spans:
            found[open_spans[-1][0]] -= (stop - start) / 1e9
        found[name] = found.get(name, 0.0) + (stop - start) / 1e9
        open_spans.append(span)
    return found


def write_timeline(
    path: str | os.PathLike[str], ranks: Mapping[int, Sequence[Span]], **about: Any
) -> None:
    """One timeline of all ranks, in Chrome's Trace Event format, whole or not at all.

    Args:
        ranks: each rank's spans, in ns of one clock.
        about: shown with the timeline.
    """
    first = min((span[2] for spans in ranks.values() for span in spans), default=0)
    events: list[dict[str, Any]] = []
    for rank, spans in sorted(ranks.items()):
        events.append(
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank}
            | {"args": {"name": f"rank {rank}"}}
        )
        for name, block, start, stop in sorted(spans, key=lambda span: (span[2], -span[3])):
            event = {"ph": "X", "name": name, "cat": "astra", "pid": 0, "tid": rank}
            event |= {"ts": (start - first) / 1e3, "dur": (stop - start) / 1e3}  # µs
            events.append(event | ({"args": {"block": block}} if block >= 0 else {}))
    content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
    part = f"{os.fspath(path)}.part"
    with open(part, "w") as file:
        json.dump(content, file)
    os.replace(part, path)
