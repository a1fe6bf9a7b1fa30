"""The latency bench with a tiny model: what is recorded, and what links make of it."""

from __future__ import annotations

import json

import pytest
import torch

from bench import codebooks
from bench.baselines import methods
from bench.latency import __main__ as program
from bench.latency import curve, curve_tables, frames, record
from bench.latency import tables as tables_latency
from bench.latency.record import Event, Recording
from bench.latency.subjects import Subject
from bench.link.model import Link
from bench.link.virtual import SocketCosts

FREE = SocketCosts()


def ticking():
    """A clock of which every reading is a millisecond later: stages take what they take."""
    now = 0.0

    def read() -> float:
        nonlocal now
        now += 1e-3
        return now

    return read


@pytest.fixture(scope="module")
def subject():
    return Subject.make("tiny", 64)


def test_the_default_codebook_is_that_of_the_commands(subject, monkeypatch):
    asked = []

    def ensure(options, model, tokenizer):
        asked.append((options.model, options.codebook, model, tokenizer))
        return "book", "folder"

    monkeypatch.setattr(codebooks, "ensure_codebook", ensure)
    monkeypatch.setattr(codebooks, "load_tokenizer", lambda name: f"tokenizer of {name}")
    assert subject.codebook("default") == "book"
    assert asked == [("tiny", None, subject.model, "tokenizer of tiny")]
    assert codebooks.full_name("default") == "transform:100+400"
    assert codebooks.full_name("kv:3") == "kv:3"


def test_played_events_take_what_they_are_worth():
    link = Link(8.0, rtt_ms=4.0)  # 1 MB/s
    sender = [Event(0.010, to=1, size=1000), Event(0.005, to=1, size=2000), Event(0.1)]
    hearer = [Event(0.001, sources=(0,)), Event(0.002, sources=(0,)), Event(0.003)]
    played = Recording([sender, hearer], (1,), 3000.0)
    first = 0.010 + link.seconds(1000)
    second = max(0.015, first) + link.seconds(2000) + 0.002
    assert played.finish(link, FREE) == pytest.approx(second + 0.003)
    assert played.finish(link, FREE, speed=1e9) == pytest.approx(
        link.seconds(1000) + link.seconds(2000) + 0.002, rel=1e-6
    )
    assert played.computing == [pytest.approx(0.115), pytest.approx(0.006)]
    # of several ranks with the answer, the first counts
    both = Recording([sender, hearer], (0, 1), 0.0)
    assert both.finish(link, FREE) == pytest.approx(min(0.115, second + 0.003))


@pytest.mark.parametrize("setting", ["hidden:1", "kv:4"])
def test_the_engine_is_recorded(subject, setting):
    book = subject.codebook(setting)
    (found,) = record.astra(subject, book, 3, 1, clock=ticking())
    assert found.answers == (2,)
    blocks, tokens = 4, subject.tokens
    messages = [sum(event.to >= 0 for event in events) for events in found.ranks]
    assert messages == [2 * blocks, blocks, 0]  # to every later rank, in every block
    assert found.payload < 2 * tokens * blocks * book.bits / 8 + 100
    assert set(found.stages) >= {"compute", "encode", "attend", "merge"}
    assert "wait" not in found.stages
    assert all(seconds >= 0 for seconds in found.stages.values())
    slow, fast = (found.finish(Link(mbit), FREE) for mbit in (0.05, 1000.0))
    assert slow > 2 * fast
    assert fast >= found.computing[2]


@pytest.mark.parametrize("name", ["tp", "sp", "bp_ag_nb1", "segment_means"])
def test_baselines_are_recorded(subject, name):
    (found,) = record.baseline(subject, methods()[name], 2, 1, clock=ticking())
    assert found.answers
    assert sum(e.size for events in found.ranks for e in events) == found.payload
    assert not found.stages


def test_a_run_writes_cases_that_tables_show(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.report.results.RESULTS", tmp_path)
    asked = ["--models", "tiny", "--tokens", "64", "--ranks", "2", "--repeats", "1"]
    asked += ["--mbit", "10", "100", "--rtt-ms", "2", "--methods", "sp", "--speeds", "1", "4"]
    threads = torch.get_num_threads()
    program.main(asked)
    torch.set_num_threads(threads)
    (path,) = tmp_path.rglob("latency_tiny_64.json")
    report = json.loads(path.read_text())
    assert len(report["cases"]) == 2 * 2 * 2  # settings, rates, speeds
    for case in report["cases"]:
        assert case["name"].startswith("latency_tiny_64_2ranks_")
        assert case["impl"] in ("astra hidden:1", "astra kv:4")
        assert set(case["peers"]) == {"single", "sp"}
        assert case["floor_ms"] == pytest.approx(case["peers"]["single"] / 2, rel=1e-3)
    scaled = [case for case in report["cases"] if case["speed"] == 4]
    assert all("_scaled4" in case["name"] for case in scaled)
    shown = tables_latency.latency(report)
    for mbit in (10, 100):
        assert f"| {mbit} |" in shown


def test_times_are_brought_to_the_usual_pace():
    found = iter([1.0, 1.0, 2.0, 2.0, 1.0])
    pace = curve.Pace(lambda: next(found))
    at = [pace.of(lambda: "work")[1] for _ in range(4)]
    assert [pace.usual(n) for n in at] == [1.0, 1 / 1.5, 0.5, 1 / 1.5]
    event, stages = record.Event(2.0, to=1, size=3), {"attend": 1.0}
    scaled = record.Recording([[event]], (0,), 0.0, stages, (stages,)).scaled(0.5)
    assert scaled.ranks == [[record.Event(1.0, to=1, size=3)]]
    assert scaled.stages_of == ({"attend": 0.5},)


def test_a_curve_names_what_bounds_it(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.report.results.RESULTS", tmp_path)
    monkeypatch.setattr(curve, "keep_memory", lambda: None)  # the tests' process stays as it is
    threads = torch.get_num_threads()
    curve.main(
        ["--model", "tiny", "--tokens", "96", "--ranks", "2", "--repeats", "1", "--name", "curve"]
    )
    torch.set_num_threads(threads)
    (path,) = tmp_path.rglob("curve.json")
    report = json.loads(path.read_text())
    (case,) = report["cases"]
    assert set(case["peers"]) == {"single", "torch"}
    assert case["floor_ms"] == pytest.approx(min(case["peers"].values()) / 2, rel=1e-3)
    assert sum(case["stages_ms"].values()) == pytest.approx(case["ms"]["p50"], rel=0.01)
    assert case["frames"] == 4  # one a block
    assert case["payload_bytes"] < 4 * 96
    assert case["uplink_headers_ms"] == pytest.approx(4 * 8e-4 * (28 + 22 + 52 + 18), rel=1e-3)
    assert "| tiny | hidden:1 | 96 | 2 |" in curve_tables.curve(report)


def test_the_memory_of_ranks_is_shown():
    rank = {"weight_bytes": 2**20, "loaded_bytes": 3 * 2**20, "peak_bytes": 5 * 2**20}
    more = rank | {"peak_bytes": 7 * 2**20}
    machine = {"command": "c", "device": "d", "versions": {}}
    found = [{"tokens": 8192, "world_size": 2, "by_rank": [rank, more]}]
    assert "| 8,192 | 2 | 1 | 3 | 7 | 4 |" in curve_tables.memory({"memory": found, **machine})


def test_a_square_of_patches_is_needed():
    with pytest.raises(ValueError, match="expected a square of patches for vit-base, got 1000"):
        Subject.make("vit-base", 1000)


def test_quantized_weights_run_as_ranks():
    """Activations are quantized by their range, which a shard has of its own: close, not equal."""
    from astra_runtime import Codebook, Engine
    from astra_runtime.evaluate import run_ranks
    from bench.latency.subjects import _int8
    from tests.runtime.models import inputs_for, tiny

    plain, inputs = tiny("vit"), inputs_for("vit")
    model, other = (_int8(lambda _, seed=seed: tiny("vit", seed=seed))(0) for seed in (0, 1))

    def work(mesh):
        with Engine(model, Codebook.none(), mesh) as engine:
            return engine(**inputs).logits, engine.adapter.digest()

    with torch.inference_mode():
        exact, single = plain(**inputs).logits, model(**inputs).logits
    answers = run_ranks(2, work, timeout=30)
    for logits, _ in answers:
        error = float((logits - single).abs().max() / single.abs().max())
        assert error < 0.1
        assert not torch.equal(logits, exact)
    with Engine(other, Codebook.none()) as engine:
        assert engine.adapter.digest() != answers[0][1]


def test_the_tail_of_a_stream_is_named_by_what_it_exceeds():
    def noted(ms, **more):
        keys = (*frames.PARTS, *frames.COUNTS)
        return {"ms": ms, "stages": {}, **dict.fromkeys(keys, 0.0), **more}

    quick = [noted(10.0 + n / 1000) for n in range(199)]
    first = {"astra": [*quick, noted(50.0, wait=38.0)], "single": quick[:100]}
    other = {"astra": [*quick, noted(50.0, away=36.0)], "single": quick[:100]}
    setup = frames.Settings("vit-base", 196, "hidden:1", 10.0, 2.0)
    ours, alone = frames.cases_of(setup, [first, other])
    assert (ours.impl, alone.impl) == ("astra hidden:1", "one device")
    assert ours.ms.p50 == 10.099
    assert [ours.extra[name] for name in ("p99_ms", "p99.9_ms", "max_ms")] == [10.197, 50.0, 50.0]
    assert [one["picture"] for one in ours.extra["slowest"]] == [199, 198]
    # half of the two slowest, over the mean of all
    assert ours.extra["tail_ms"][0]["wait"] == 19.0
    assert ours.extra["mean_ms"][1]["away"] == pytest.approx(0.18)
    cases = [ours.as_dict(), alone.as_dict()]
    machine = {"command": "c", "device": "d", "versions": {}}
    (row,) = [
        line for line in tables_latency.frames({"cases": cases, **machine}).splitlines()
        if "hidden" in line
    ]  # fmt: skip
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == ["200", "10", "10", "50", "50"]
    assert cells[6:] == ["1.01", "+0", "+0", "+0", "+0", "+19", "+0", "+0", "+18"]
    assert ours.extra["p99_over_p50"] == pytest.approx(10.197 / 10.099)
    assert ours.extra["tail_over_single"] == pytest.approx(10.197 / 10.099 / (10.098 / 10.049))
