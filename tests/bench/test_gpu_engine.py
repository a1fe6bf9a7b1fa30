"""The engine's measure on a GPU, tried on a CPU: its ranks alone are the ranks of a mesh."""

from __future__ import annotations

import json
import time
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")

from astra_runtime import Engine
from astra_runtime.codes import packed, staging
from astra_runtime.trace import Trace
from astra_runtime.transport import Link
from bench import gpu_engine
from bench.gpu import graphs
from bench.gpu.memory import run_on_device
from bench.gpu.ranks import Replaying, record
from bench.gpu.stages import Rank, Stopwatch, linked, stages_of
from bench.report import Times

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_rank_alone_does_what_it_did_among_the_others():
    model = gpu_engine.make_model(gpu_engine.TINY, CPU)
    codebook = gpu_engine.make_codebook(model, gpu_engine.TINY)
    ids = torch.randint(0, gpu_engine.TINY.vocabulary, (1, 96))
    received, logits = record(model, codebook, ids, 3)
    for rank in range(3):
        mesh = Replaying(rank, 3, received[rank])
        with Engine(model, codebook, mesh) as engine:
            alone = engine(input_ids=ids).logits
        torch.testing.assert_close(alone, logits)
        blocks = [block for block in mesh.sent if block < gpu_engine.TINY.layers]
        assert len(blocks) == (
            gpu_engine.TINY.layers if rank < 2 else 0
        )  # the last is heard by none
    # what a rank was sent decides its answer
    spoiled = {key: bytes(len(data)) for key, data in received[2].items()}
    with Engine(model, codebook, Replaying(2, 3, spoiled)) as engine:
        assert not torch.allclose(engine(input_ids=ids).logits, logits)


def test_ranks_exchange_in_the_memory_of_one_device(monkeypatch):
    """As over NCCL: nothing of a block comes to the host."""
    model = gpu_engine.make_model(gpu_engine.TINY, CPU)
    codebook = gpu_engine.make_codebook(model, gpu_engine.TINY)
    ids = torch.randint(0, gpu_engine.TINY.vocabulary, (1, 96))
    _, want = record(model, codebook, ids, 3)
    monkeypatch.setattr(packed, "stays_packed", lambda device: True)
    monkeypatch.delattr(staging.Staging, "download")
    monkeypatch.delattr(staging.Staging, "upload")
    work = partial(gpu_engine.logits_of, model, codebook, ids)
    for logits in run_on_device(3, CPU, work):
        torch.testing.assert_close(logits, want)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_call_in_pieces_is_the_call(rank):
    """What would be captured runs once here, in the order of a replay."""
    shape = gpu_engine.TINY
    model = gpu_engine.make_model(shape, CPU)
    codebook = gpu_engine.make_codebook(model, shape)
    ids = torch.randint(0, shape.vocabulary, (1, 96))
    received, logits = record(model, codebook, ids, 3)
    with Engine(model, codebook, Replaying(rank, 3, received[rank])) as engine:
        pieces = graphs.capture(engine, CPU, ids)
        alone = engine(input_ids=ids).logits  # nothing is left of the capture
    torch.testing.assert_close(alone, logits)
    last = model.lm_head(pieces.hidden[:, -1:]) if rank == 2 else logits
    torch.testing.assert_close(last, logits)
    # two graphs a block where codes are sent, one where they are not, and one behind the last
    assert pieces.num_graphs == 1 + shape.layers * (2 if rank < 2 else 1)
    assert torch.equal(pieces.hidden, pieces.want)
    pieces.replay()


def test_the_order_of_a_replay(monkeypatch):
    shape, order = gpu_engine.TINY, []

    class Noted(graphs.NoGraphs):
        def begin(self):
            order.append("begin")

        def end(self):
            order.append("end")
            return lambda: order.append("graph")

    monkeypatch.setattr(graphs, "NoGraphs", Noted)
    model = gpu_engine.make_model(shape, CPU)
    codebook = gpu_engine.make_codebook(model, shape)
    ids = torch.randint(0, shape.vocabulary, (1, 96))
    received, _ = record(model, codebook, ids, 3)
    with Engine(model, codebook, Replaying(1, 3, received[1])) as engine:
        pieces = graphs.capture(engine, CPU, ids)
    assert order == ["begin", "end"] * 2 * pieces.num_graphs  # once for a call that is compared
    for use in ("download", "upload"):
        plain = getattr(pieces.staging, use)
        monkeypatch.setattr(
            pieces.staging, use, lambda *a, use=use, plain=plain: (order.append(use), plain(*a))[1]
        )
    order.clear()
    pieces.replay()
    block = ["graph", "download", "graph", "upload"]
    assert order == block * shape.layers + ["graph"]


def test_stages_by_block():
    trace = Trace()
    for block in (0, 1):
        start = block * 100_000_000
        for name, begin, end in (
            ("encode", 0, 10), ("pack", 6, 9), ("attend", 10, 14), ("attend", 20, 27),
            ("merge", 27, 28),
        ):  # fmt: skip
            trace.add(name, block, start + begin * 1_000_000, start + end * 1_000_000)
    trace.add("compute", -1, 0, 200_000_000)
    assert stages_of(trace, 2) == {
        "encode": [7.0, 7.0], "pack": [3.0, 3.0], "attend_near": [4.0, 4.0],
        "attend_far": [7.0, 7.0], "merge": [1.0, 1.0],
    }  # fmt: skip


def test_what_a_link_adds():
    """Two blocks; codes that take 8 ms to cross hide behind 3 ms of local attention."""
    stages = {"attend_near": [3.0, 3.0], "encode": [1.0, 1.0], "wait": [0.5, 0.5]}
    fast = Rank(Times(20.0, 20.0, 20.0), stages, {0: 10_000, 1: 10_000}, 8)
    slow = Rank(Times(25.0, 25.0, 25.0), stages, {}, 8)
    assert linked([fast, slow], 1e9, 0.0) == pytest.approx(3 + 3 + 25 - 6 - 1, abs=1e-3)
    crossing = 1e3 * Link(10, 0.0).seconds(10_000)
    assert crossing > 8
    assert linked([fast, slow], 10, 0.0) == pytest.approx(2 * crossing + 25 - 6 - 1)
    assert linked([fast, slow], 10, 2.0) == pytest.approx(2 * (crossing + 2) + 25 - 6 - 1)


def test_a_stopwatch():
    times = Stopwatch(CPU, 3).time(lambda: time.sleep(0.002))
    assert 2 <= times.p20 <= times.p80


@pytest.mark.timeout(300)
def test_the_file(tmp_path):
    arguments = ["--device", "cpu", "--small", "--tokens", "88", "--world-sizes", "2"]
    assert gpu_engine.main([*arguments, "--repeats", "1", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/engine_small.json")
    report = json.loads(path.read_text())
    assert report["complete"]
    assert report["equality"]["passed"]
    names = [case["name"] for case in report["cases"]]
    assert names[:3] == ["engine_single_T88", "engine_rank_T88_N2_r0", "engine_rank_T88_N2_r1"]
    assert names[3:5] == ["engine_graphs_T88_N2_r0", "engine_graphs_T88_N2_r1"]
    assert [name.rpartition("_")[2] for name in names[5:]] == [f"{r}mbit" for r in gpu_engine.RATES]
    first, last = report["cases"][1:3]
    assert {"encode", "attend_near", "mlp", "project"} <= set(first["stages"])
    assert {"unpack", "attend_far", "merge"} <= set(last["stages"])
    bits = 2 * 5 * first["own_tokens"]  # two codes of 5 bits a token
    assert 0 < first["bytes_a_block"] <= -(-bits // 8)  # the halo of the next rank is not sent


def test_other_codes_are_an_error(monkeypatch):
    """Ranks whose answer differs from the CPU's are found out."""
    real, calls = gpu_engine.record, []

    def other(model, codebook, ids, world_size):
        received, logits = real(model, codebook, ids, world_size)
        calls.append(1)
        return received, logits * (1.01 if len(calls) == 2 else 1.0)

    monkeypatch.setattr(gpu_engine, "record", other)
    assert not gpu_engine.check_equal(gpu_engine.TINY, CPU, 80, 2)["passed"]
