"""Where a run's time goes: a timeline for chrome://tracing or ui.perfetto.dev, one row a rank.

Code on the hot path says what it is doing with `stage`, which costs a third of a microsecond where
nobody listens. Inside `tracing`, the stages of this thread are kept in a `Trace`. Stages nest: the
time of the model's own work, "compute", is what no other stage in it takes.

Work on a GPU is queued, and done later: `DeviceTrace` keeps when the device began a stage and ended
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch

STAGES = ("compute", "encode", "pack", "send", "wait", "unpack", "attend", "merge")
Span = tuple[str, int, int, int]  # stage, block or −1, start and stop in ns


class Trace:
    """The stages of one rank, in the order in which they ended. `clock` gives nanoseconds."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.clock = clock
        self._spans: list[Span] = []

    @property
    def spans(self) -> list[Span]:
        return self._spans

    def mark(self) -> Any:
        """This moment."""
        return self.clock()

    def add(self, name: str, block: int, start: Any, stop: Any) -> None:
        """A stage between two moments."""
        self._spans.append((name, block, start, stop))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, each without the stages inside it; all of `STAGES`."""
        return exclusive(self.spans)


class DeviceTrace(Trace):
    """The stages of one rank on a CUDA device, by events in the stream that its work is queued in.

    A stage in which the host waits, for the network for instance, takes as long here as the device
    had nothing to do meanwhile. Reading `spans` waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._stages: list[tuple[str, int, Any, Any]] = []
        self._synchronize()
        self._origin, self._began = self.mark(), self.clock()

    @property
    def spans(self) -> list[Span]:
        if self._stages:
            self._synchronize()
            self._spans += [
                (name, block, self._nanoseconds(start), self._nanoseconds(stop))
                for name, block, start, stop in self._stages
            ]
            self._stages.clear()
        return self._spans

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def add(self, name: str, block: int, start: Any, stop: Any) -> None:
        self._stages.append((name, block, start, stop))

    def _synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def _nanoseconds(self, mark: Any) -> int:
        return self._began + round(1e6 * self._origin.elapsed_time(mark))


def trace_of(device: torch.device) -> Trace:
    """A trace with the clock of `device`: events on a GPU, the host's clock elsewhere."""
    return DeviceTrace(device) if device.type == "cuda" else Trace()


class _Stage:
    __slots__ = ("block", "name", "start", "trace")

    def __init__(self, trace: Trace, name: str, block: int) -> None:
        self.trace, self.name, self.block = trace, name, block

    def __enter__(self) -> None:
        self.start = self.trace.mark()

    def __exit__(self, *_: object) -> None:
        self.trace.add(self.name, self.block, self.start, self.trace.mark())


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
    seconds = dict.fromkeys(STAGES, 0.0)
    # a span lies within the last one that began before it and has not ended
    open_spans: list[Span] = []
    for span in sorted(spans, key=lambda span: (span[2], -span[3])):
        name, _, start, stop = span
        while open_spans and open_spans[-1][3] <= start:
            open_spans.pop()
        if open_spans:
            seconds[open_spans[-1][0]] -= (stop - start) / 1e9
        seconds[name] = seconds.get(name, 0.0) + (stop - start) / 1e9
        open_spans.append(span)
    return seconds


def write_timeline(
    path: str | os.PathLike[str], ranks: Mapping[int, Sequence[Span]], **about: Any
) -> None:
    """One timeline of all ranks, in Chrome's Trace Event format.

    A file is written whole or not at all; a pipe or a device gets it as it comes.

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
    target = os.path.realpath(path)
    regular = os.path.isfile(target) or not os.path.exists(target)
    if not regular:
        with open(target, "w") as file:
            json.dump(content, file)
        return
    part = f"{target}.part"
    try:
        with open(part, "w") as file:
            json.dump(content, file)
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
