"""Timelines: nested stages, every rank's row on one clock."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from astra_runtime import Engine
from astra_runtime.deploy import jobs
from astra_runtime.deploy.jobs import Ranks
from astra_runtime.evaluate import run_ranks
from astra_runtime.trace import (
    STAGES,
    DeviceTrace,
    Span,
    Trace,
    exclusive,
    stage,
    trace_of,
    tracing,
    write_timeline,
)
from astra_runtime.transport import Mesh

from .models import fitted, inputs_for, tiny

NESTED: list[Span] = [
    ("pack", 0, 30, 40),
    ("encode", 0, 10, 50),
    ("wait", 0, 60, 90),
    ("compute", -1, 0, 100),
    ("compute", -1, 120, 130),
]


def test_a_stage_is_without_the_stages_in_it() -> None:
    found = {name: round(1e9 * seconds) for name, seconds in exclusive(NESTED).items()}
    assert found == dict.fromkeys(STAGES, 0) | {
        "compute": 100 - 40 - 30 + 10,
        "encode": 30,
        "pack": 10,
        "wait": 30,
    }


def test_nobody_listens_nothing_is_kept() -> None:
    trace = Trace()
    with stage("attend", 3):
        pass
    with tracing(None), stage("attend", 3):
        pass
    assert not trace.spans
    with tracing(trace), stage("attend", 3):
        time.sleep(0.01)
    ((name, block, start, stop),) = trace.spans
    assert (name, block) == ("attend", 3)
    assert stop - start >= 10_000_000


def test_a_stage_that_fails_is_kept_too() -> None:
    trace = Trace()
    with pytest.raises(ValueError), tracing(trace), stage("wait", 1):
        raise ValueError
    assert [span[:2] for span in trace.spans] == [("wait", 1)]


def test_stages_on_a_device_are_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is pretended: its clock stands still while the host only queues work."""
    clock, waited = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "of cuda:0"
            self.at = clock[0]

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    trace = trace_of(torch.device("cuda:0"))
    assert isinstance(trace, DeviceTrace)
    with tracing(trace):
        with stage("encode", 1):
            time.sleep(0.01)
            clock[0] += 2.0  # milliseconds
            with stage("pack", 1):
                clock[0] += 1.0
        assert len(waited) == 1  # nothing waits for the device while stages are kept
    spans = trace.spans
    assert [(name, block, stop - start) for name, block, start, stop in spans] == [
        ("pack", 1, 1_000_000),
        ("encode", 1, 3_000_000),
    ]
    assert len(waited) == 2
    assert trace.seconds()["encode"] == pytest.approx(0.002)
    assert trace.spans == spans
    assert type(trace_of(torch.device("cpu"))) is Trace


def test_an_engine_tells_every_stage() -> None:
    model, inputs = tiny("llama"), inputs_for("llama")
    book = fitted("llama", model, space="kv", groups=3)
    blocks = len(model.model.layers)

    def work(mesh: Mesh) -> tuple[Trace, float]:
        trace = Trace()
        with Engine(model, book, mesh) as engine:
            engine(**inputs)
            start = time.perf_counter()
            with tracing(trace):
                engine(**inputs)
            return trace, time.perf_counter() - start

    (first, _), (middle, seconds), (last, _) = run_ranks(3, work, timeout=30)
    assert {name for name, *_ in middle.spans} == set(STAGES)
    for name in ("encode", "pack", "unpack", "merge"):
        assert [s[1] for s in middle.spans if s[0] == name] == list(range(blocks))
    assert [s[1] for s in middle.spans if s[0] == "attend"] == [
        b for b in range(blocks) for _ in "12"
    ]
    assert "unpack" not in {s[0] for s in first.spans}  # receives from nobody
    assert "encode" not in {s[0] for s in last.spans}  # nobody receives from it
    # the stages without those in them are all of the pass, and each is at least nothing
    told = middle.seconds()
    assert min(told.values()) >= 0
    whole = sum(stop - start for name, _, start, stop in middle.spans if name == "compute") / 1e9
    assert sum(told.values()) == pytest.approx(whole, rel=1e-6)
    assert whole <= seconds


def test_the_leader_gets_all_ranks_on_its_own_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("llama"), inputs_for("llama")["input_ids"]
    book = fitted("llama", model, space="kv", groups=3)
    ahead = threading.local()  # of the first rank's clock

    def now() -> int:
        return time.perf_counter_ns() + int(ahead.ns)

    monkeypatch.setattr(jobs, "time", SimpleNamespace(**vars(time) | {"perf_counter_ns": now}))

    def work(mesh: Mesh) -> dict[int, list[Span]]:
        ahead.ns = 10**12 * mesh.rank
        ranks = Ranks(model, book, mesh)
        ranks.trace.clock = now
        if mesh.rank:
            ranks.worker_loop(idle=60)
            ranks.close()
            return {}
        job = {"do": "prefill", "input_ids": ids.tolist(), "space": "codes", "repeats": 1}
        ranks.submit(**job)
        ranks.tracing = True
        start = time.perf_counter_ns()
        ranks.submit(**job)
        stop = time.perf_counter_ns()
        ranks.tracing = False
        ranks.submit(**job)
        found: dict[int, list[Span]] = ranks.submit(do="timeline")
        ranks.submit(do="stop")
        ranks.close()
        slack = 10**9  # on a busy machine the shortest round trip is a long one
        for spans in found.values():
            assert all(start - slack <= s[2] <= s[3] <= stop + slack for s in spans)
        return found

    found = run_ranks(3, work, timeout=60)[0]
    assert sorted(found) == [0, 1, 2]
    path = tmp_path / "timeline.json"
    write_timeline(path, found, model="tiny")
    content = json.loads(path.read_text())
    assert content["otherData"] == {"model": "tiny"}
    events = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert len(events) == sum(map(len, found.values()))
    assert min(event["ts"] for event in events) == 0
    rows = {e["args"]["name"] for e in content["traceEvents"] if e["ph"] == "M"}
    assert rows == {"rank 0", "rank 1", "rank 2"}
    waits = [e for e in events if e["name"] == "wait" and e["tid"] == 2 and "args" in e]
    assert [e["args"]["block"] for e in waits] == list(range(len(model.model.layers)))
