"""Which tile a kernel runs with: frozen data, and one predicate of what a chip can hold.

Each kernel describes its problem (a ``Problem``) and lists tiles, best first. The choice is the
first legal one, so that a chip with less shared memory gets the next smaller. What ``warmup`` has
measured on this very device, and keeps on disk, goes before the list.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from astra_kernels._cache import cache_folder
from astra_kernels._replay import forget as forget_calls
from astra_kernels._replay import suspended

# Shared memory one block may use, in bytes, by compute capability (CUDA C++ programming guide,
# table "technical specifications per compute capability", less 1 KiB that the system keeps).
SHARED_MEMORY = {
    80: 166_912,
    86: 101_376,
    87: 166_912,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    103: 232_448,
    120: 101_376,
    121: 101_376,
}
SHARED_MEMORY_ELSEWHERE = 101_376

# 32-bit registers a thread may have.
REGISTERS = 255


@dataclass(frozen=True)
class Tile:
    """rows x columns of results that a program works on; depth: channels of one step, 0 = all."""

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 0


@dataclass(frozen=True)
class Problem(ABC):
    """What the choice of a tile depends on, and what a measured choice is remembered under."""

    capability: int
    itemsize: int

    @abstractmethod
    def tiles(self) -> Sequence[Tile]:
        """Tiles to choose from, best first."""

    @abstractmethod
    def shared_bytes(self, tile: Tile) -> int:
        """Upper bound of the shared memory a program takes."""

    @abstractmethod
    def registers(self, tile: Tile) -> int:
        """Estimate of the registers a thread needs."""


def shared_memory(capability: int) -> int:
    return SHARED_MEMORY.get(capability, SHARED_MEMORY_ELSEWHERE)


def legal(tile: Tile, problem: Problem) -> bool:
    """Whether the chip can hold the tile, in shared memory and in registers."""
    fits = problem.shared_bytes(tile) <= shared_memory(problem.capability)
    return fits and problem.registers(tile) <= REGISTERS


def candidates(problem: Problem) -> list[Tile]:
    return [tile for tile in problem.tiles() if legal(tile, problem)]


def choose(problem: Problem) -> Tile:
    """The tile to run a problem with: the one measured on this device, else the first legal one."""
    if _watched.problems is not None:
        _watched.problems.append(problem)
    tile = _chosen.get(problem)
    if tile is None:
        tile = _chosen[problem] = measured(problem) or _first(problem)
    return tile


def _first(problem: Problem) -> Tile:
    for tile in problem.tiles():
        if legal(tile, problem):
            return tile
    raise RuntimeError(f"no tile fits this device for {problem}")


@contextlib.contextmanager
def watch() -> Iterator[list[Problem]]:
    """Collects the problems that this thread chooses tiles for."""
    seen: list[Problem] = []
    _watched.problems = seen
    try:
        with suspended():
            yield seen
    finally:
        _watched.problems = None


def remember(problem: Problem, tile: Tile) -> None:
    """From now on ``choose`` gives this tile."""
    _chosen[problem] = tile
    forget_calls()


def forget() -> None:
    """Choices are made anew, and measured ones read from disk again."""
    _chosen.clear()
    forget_calls()
    _from_disk.cache_clear()


_chosen: dict[Problem, Tile] = {}


class _Watched(threading.local):
    problems: list[Problem] | None = None


_watched = _Watched()


# Measured tiles on disk: one file a device and version of Triton, {problem: tile}.


def measured(problem: Problem) -> Tile | None:
    values = _from_disk().get(repr(problem))
    if values is None:
        return None
    tile = Tile(**values)
    return tile if legal(tile, problem) else None  # the file may be of another version of ours


def save(tiles: Mapping[Problem, Tile]) -> Path:
    """Adds measured tiles to this device's file; it is replaced at once, never half written.

    Processes that tune at the same time add to it one after the other.
    """
    path = tiles_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _from_disk.cache_clear()
        merged = dict(_from_disk()) | {repr(p): asdict(tile) for p, tile in tiles.items()}
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(json.dumps(merged, indent=1))
        fresh.replace(path)
        _from_disk.cache_clear()
    return path


def tiles_file() -> Path:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    name = f"{device}-triton-{triton.__version__}".lower().replace(" ", "-")
    return cache_folder() / "tiles" / f"{name}.json"


@functools.cache
def _from_disk() -> dict[str, dict[str, int]]:
    try:
        read: dict[str, dict[str, int]] = json.loads(tiles_file().read_text())
    except (OSError, ValueError):  # no file is the usual case; a broken one is no reason to fail
        return {}
    return read
