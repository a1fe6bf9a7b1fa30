"""Measuring tiles: every legal one of every problem in a call, the quickest kept on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

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
        best[problem] = _quickest(call, problem)
        tiles.remember(problem, best[problem])
    if best:
        tiles.save(best)
    return {repr(problem): asdict(tile) for problem, tile in best.items()}


def _quickest(call: Call, problem: Problem) -> Tile:
    times: dict[Tile, float] = {}
    for tile in tiles.candidates(problem):
        tiles.remember(problem, tile)
        try:
            times[tile] = _milliseconds(call)
        except triton.TritonError:  # the tile is too large after all, or has no code
            times[tile] = math.inf
    return min(times, key=times.__getitem__)


def _milliseconds(call: Call) -> float:
    if interpreted():  # there is no device whose time to take
        return 0.0
    median: float = triton.testing.do_bench(
        call, warmup=WARMUP_MS, rep=MEASURE_MS, return_mode="median"
    )
    return median
