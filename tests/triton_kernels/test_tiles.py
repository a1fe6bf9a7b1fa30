"""Tile choices: legality, the order of choice, and what ``warmup`` keeps on disk."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import asdict

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

import astra_kernels as ak
from astra_kernels import _dispatch
from astra_kernels._triton import tiles, tuning
from astra_kernels._triton.attend_tiles import AttendProblem
from astra_kernels._triton.attention import problem_of
from astra_kernels._triton.launch import cdiv, launch, next_power_of_2, record
from astra_kernels._triton.sources import Coded, Dense, Keys
from astra_kernels._triton.tiles import Tile
from astra_kernels.encode import reference as encode_reference


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path))
    tiles.forget()
    yield
    tiles.forget()


def problem(capability=90, channels=64):
    return AttendProblem(capability, 2, channels, 2, False, False, 1, False, 0)


def call():
    torch.manual_seed(0)
    codes = torch.zeros(1, 8, 2, dtype=torch.int32)
    query, tables = torch.randn(1, 2, 3, 16), torch.randn(2, 2, 1, 4, 16)
    return ak.coded_attention(query, codes, *tables, impl="triton")


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120, 999])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_device_has_a_legal_tile(capability, itemsize):
    for channels, few_rows, loaded, summed in itertools.product(
        (16, 32, 64, 128, 256), (0, 16, 64), (False, True), (1, 2, 16)
    ):
        flags = (loaded, loaded, summed, loaded, few_rows)
        case = AttendProblem(capability, itemsize, channels, itemsize, *flags)
        tile = tiles.choose(case)
        assert tile in case.tiles()
        assert case.shared_bytes(tile) <= tiles.shared_memory(capability)


def test_a_smaller_chip_gets_a_smaller_tile():
    large, small = problem(90, 256), problem(86, 256)
    assert large.shared_bytes(tiles.choose(large)) > tiles.shared_memory(86)
    assert small.shared_bytes(tiles.choose(small)) <= tiles.shared_memory(86)


def test_warmup_keeps_the_quickest_on_disk(monkeypatch):
    times = iter([3.0, 1.0, 2.0, *[5.0] * 50])
    monkeypatch.setattr(tuning, "_milliseconds", lambda call: next(times))
    want = call()
    found = ak.warmup(call)
    (key,) = found
    kept = json.loads(tiles.tiles_file().read_text())
    assert kept == found
    with tiles.watch() as seen:
        got = call()
    assert [repr(p) for p in seen] == [key]
    assert tiles.candidates(seen[0])[1] == Tile(**found[key])
    torch.testing.assert_close(got, want)
    tiles.forget()  # as a new process
    assert tiles.choose(seen[0]) == Tile(**found[key])


def test_warmup_goes_on_where_a_tile_does_not_fit(monkeypatch):
    def milliseconds(call):
        if next(calls) == 0:
            raise OutOfResources(2, 1, "shared memory")
        return 1.0

    calls = itertools.count()
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    found = ak.warmup(call)
    with tiles.watch() as seen:
        call()
    assert found[repr(seen[0])] == asdict(tiles.candidates(seen[0])[1])


@pytest.mark.parametrize("error", [OutOfResources(2, 1, "x"), RuntimeError("PassManager::run")])
def test_a_tile_is_not_kept_where_none_runs(monkeypatch, error):
    def milliseconds(call):
        raise error

    with tiles.watch() as seen:
        call()
    before = tiles.choose(seen[0])
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    with pytest.raises(RuntimeError, match="no tile runs"):
        ak.warmup(call)
    assert tiles.choose(seen[0]) == before
    assert not tiles.tiles_file().exists()


def test_an_error_of_the_device_ends_tuning(monkeypatch):
    def milliseconds(call):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    with pytest.raises(torch.AcceleratorError):
        ak.warmup(call)


def test_processes_that_tune_at_once_keep_each_others_tiles():
    a, b = problem(), problem(80)
    tiles.save({a: tiles.choose(a)})
    assert tiles.measured(a)  # read, and remembered as it is now
    kept = json.loads(tiles.tiles_file().read_text())
    other = {"of another process": asdict(tiles.choose(b))}
    tiles.tiles_file().write_text(json.dumps(kept | other))
    tiles.save({b: tiles.choose(b)})
    assert set(json.loads(tiles.tiles_file().read_text())) == {repr(a), repr(b), *other}


@pytest.mark.parametrize(
    ("cuda", "capability", "runs"),
    [
        ("13.0", (9, 0), True),
        ("12.8", (8, 0), True),
        ("12.8", (7, 5), False),
        (None, (9, 4), False),
    ],
)
def test_platforms(monkeypatch, cuda, capability, runs):
    """ROCm calls its devices "cuda"; before sm_80 there is too little shared memory."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    _dispatch._supported.cache_clear()
    assert _dispatch.runs_triton(torch.device("cuda", 0)) is runs
    assert not _dispatch.runs_triton(torch.device("meta"))
    chosen = _dispatch.choose("encode", "auto", torch.device("cuda", 0), torch.float32)
    assert (chosen.run is not encode_reference.encode) is runs
    _dispatch._supported.cache_clear()


def test_a_grid_that_would_start_nothing_is_refused():
    with pytest.raises(ValueError, match="at most 2147483647 programs"):
        launch(None, (2**20, 2**12), device=torch.device("cpu"), warps=4, stages=1)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 127, 128, 129])
def test_sizes_as_triton_has_them(size):
    assert next_power_of_2(size) == triton.next_power_of_2(size)
    assert cdiv(size, 4) == triton.cdiv(size, 4)


def test_the_key_of_a_tile_says_what_decides():
    def key(m=512, batch=1, rope=False, bits=None, causal=False, angles=torch.float16):
        query = torch.empty(batch, 4, m, 64, dtype=torch.float16)
        table = torch.empty(1, 2, 1, 8, 64, dtype=torch.float16)
        codes = torch.empty(batch, 9, 2, dtype=torch.int32)
        angle = torch.empty(9, 64, dtype=angles)
        coded = Coded(
            9, codes, table, False, codes, table, False, bits, (angle, angle) if rope else None
        )
        near = torch.empty(batch, 2, m, 64, dtype=torch.float16)
        return problem_of(query, Keys(Dense(near, near, causal), coded))

    keys = [key(), key(m=100), key(batch=4), key(rope=True), key(bits=3), key(causal=True)]
    keys.append(key(rope=True, angles=torch.float32))
    assert len(set(keys)) == len(keys)
    assert key(m=5000) == key(m=2100)


def test_threads_do_not_see_each_others_problems_and_launches(device):
    want = call()
    got = []

    def elsewhere():
        with torch.device(device):  # the default is a thread's own
            got.extend(call())

    with tiles.watch() as seen, record(80) as launches:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen == []
    assert launches == []
    torch.testing.assert_close(tuple(got), want)


def test_kernels_are_started_by_one_thread_at_a_time():
    """One that another thread is still loading has no code yet."""
    threads, second = [], threading.Event()

    def run(**options):
        threads.append(threading.Thread(target=start))
        if len(threads) == 2:
            second.set()
            return
        threads[0].start()
        assert not second.wait(0.05)

    def start():
        launch({(1,): run}, (1,), device=torch.device("cpu"), warps=4, stages=1)

    start()
    threads[0].join()
    assert second.is_set()


def test_a_broken_or_foreign_file_is_no_reason_to_fail():
    tiles.tiles_file().parent.mkdir(parents=True)
    tiles.tiles_file().write_text("{")
    first = tiles.choose(problem())
    tiles.forget()
    impossible = {"rows": 4096, "columns": 4096, "warps": 8, "stages": 3, "depth": 0}
    tiles.tiles_file().write_text(json.dumps({repr(problem()): impossible}))
    assert tiles.choose(problem()) == first


def test_no_call_but_warmup_measures_or_writes(monkeypatch):
    monkeypatch.setattr(tuning, "_milliseconds", lambda call: pytest.fail("measured"))
    call()
    assert ak.warmup(call, tune=False) == {}
    assert not tiles.tiles_file().exists()
