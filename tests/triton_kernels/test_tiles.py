"""Tile choices: legality, the order of choice, and what ``warmup`` keeps on disk."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import asdict

import pytest
import torch
from triton.runtime.errors import OutOfResources

import astra_kernels as ak
from astra_kernels._triton import tiles, tuning
from astra_kernels._triton.attention import AttendProblem
from astra_kernels._triton.launch import record
from astra_kernels._triton.tiles import Tile


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
