"""Which tile a kernel runs with: frozen data, and one predicate of what a chip can hold.

Each kernel describes its problem (a ``Problem``) and lists tiles, best first. The choice is the
first legal one, so that a chip with less shared memory gets the next smaller. What ``warmup`` has
measured on this very device goes before the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
class Problem:
    """What the choice of a tile depends on, and what a measured choice is remembered under."""

    capability: int
    itemsize: int

    def tiles(self) -> Sequence[Tile]:
        """Tiles to choose from, best first."""
        raise NotImplementedError

    def shared_bytes(self, tile: Tile) -> int:
        """Upper bound of the shared memory a program takes."""
        raise NotImplementedError

    def registers(self, tile: Tile) -> int:
        """Estimate of the registers a thread needs."""
        raise NotImplementedError


def shared_memory(capability: int) -> int:
    return SHARED_MEMORY.get(capability, SHARED_MEMORY_ELSEWHERE)


def legal(tile: Tile, problem: Problem) -> bool:
    """Whether the chip can hold the tile, in shared memory and in registers."""
    fits = problem.shared_bytes(tile) <= shared_memory(problem.capability)
    return fits and problem.registers(tile) <= REGISTERS


def candidates(problem: Problem) -> list[Tile]:
    return [tile for tile in problem.tiles() if legal(tile, problem)]


def choose(problem: Problem) -> Tile:
    """The tile to run a problem with."""
    tile = _measured.get(problem)
    if tile is None:
        tile = next((tile for tile in problem.tiles() if legal(tile, problem)), None)
        if tile is None:
            raise RuntimeError(f"no tile of {type(problem).__name__} fits this device: {problem}")
        _measured[problem] = tile
    return tile


# Choices made so far; ``warmup`` puts measured ones here.
_measured: dict[Problem, Tile] = {}
