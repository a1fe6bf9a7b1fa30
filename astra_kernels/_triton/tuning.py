"""Measuring tiles: every legal one of every problem in a call, the quickest kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
import triton
import triton.testing

from astra_kernels._triton import tiles
from astra_kernels._triton.launch import interpreted
from astra_kernels._triton.tiles import Problem, Tile

Call = Callable[[], object]

# Milliseconds of warming up and of measuring for each tile.
WARMUP_MS, MEASURE_MS = 10, 50


def tune(call: Call) -> dict[str, dict[str, int]]:
    """Runs ``call`` with each legal tile of the problems in it, one problem after the other."""
    with tiles.watch() as seen:
        call()
    best: dict[Problem, Tile] = {}
    for problem in dict.fromkeys(seen):
        before = tiles.choose(problem)
        try:
            best[problem] = _quickest(call, problem)
        finally:
            tiles.remember(problem, best.get(problem, before))
    if best:
        tiles.save(best)
    return {repr(problem): asdict(tile) for problem, tile in best.items()}


def _quickest(call: Call, problem: Problem) -> Tile:
    times: dict[Tile, float] = {}
    failures: list[Exception] = []
    for tile in tiles.candidates(problem):
        tiles.remember(problem, tile)
        try:
            times[tile] = _milliseconds(call)
        except (triton.TritonError, RuntimeError) as error:
            if isinstance(error, torch.AcceleratorError):  # the device is of no use after it
                raise
            failures.append(error)  # too large after all, or the compiler gave up
    if not times:
        raise RuntimeError(f"no tile runs {problem}") from failures[0]
    return min(times, key=times.__getitem__)


def _milliseconds(call: Call) -> float:
    """Replayed as a graph: launched one by one, the host would take longer than most kernels."""
    if interpreted():  # there is no device whose time to take
        return 0.0
    call()  # compiles, which a capture does not allow
    try:
        replayed: float = triton.testing.do_bench_cudagraph(
            call, rep=MEASURE_MS, return_mode="median"
        )
    except RuntimeError as error:
        if "captur" not in str(error):
            raise
        torch.cuda.synchronize()
        launched: float = triton.testing.do_bench(
            call, warmup=WARMUP_MS, rep=MEASURE_MS, return_mode="median"
        )
        return launched
    return replayed
