"""How kernels are timed on a GPU, on a device and a clock that are pretended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.kernels import timing


def test_the_clock_of_a_gpu(monkeypatch):
    """Its logic, on a device and a clock that are pretended: what is queued runs at once."""
    now = [0.0]

    def spend(milliseconds):
        now[0] += milliseconds / 1e3

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    class Stream:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def wait_stream(self, _):
            pass

        synchronize = record_stream = lambda *_: None

    class Graph:
        began = ended = 0

        def capture_begin(self, capture_error_mode):
            Graph.began += 1

        def capture_end(self):
            Graph.ended += 1

        def replay(self):
            spend(1.0)

    class Properties:
        L2_cache_size = 1024

    slept = []
    empty = torch.empty

    def wait(cycles):
        slept.append(cycles)
        spend(cycles / 1e6)

    for name, pretended in {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "_sleep": wait,
        "current_stream": Stream, "stream": lambda stream: stream, "synchronize": lambda: None,
        "current_device": lambda: 0, "get_device_properties": lambda _: Properties,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, pretended)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = timing.Gpu(samples=5)
    assert clock.flushed.nbytes == 4 * 1024

    def refuses_capture():
        if Graph.began > Graph.ended:
            raise RuntimeError("operation not permitted when stream is capturing")
        spend(0.5)

    calls = {
        "quick": lambda: spend(0.5), "slow": lambda: spend(3.0),
        "waits": refuses_capture, "left out": lambda: spend(0.5),
    }  # fmt: skip
    times = clock.measure(calls, not_captured={"left out"})
    assert Graph.began == Graph.ended == 3  # quick, waits, and the one after it that succeeds
    assert times["left out"].graph is None
    assert times["left out"].eager.p50 == pytest.approx(0.5)
    assert times["quick"].warm.p50 == pytest.approx(0.5)
    assert times["quick"].cold.p50 == pytest.approx(0.5)
    assert times["quick"].graph.p50 == pytest.approx(1 / timing.MOST_REPEATS)
    assert times["quick"].eager.p50 == pytest.approx(0.5)
    assert times["slow"].graph is None  # too long for launches to matter
    assert times["waits"].graph is None
    assert times["waits"].warm.p50 == pytest.approx(0.5)
    assert slept
