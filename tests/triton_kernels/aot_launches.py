"""What the compiler is given: launches of calls, each different one once; and which stand for all.

Many calls lead to the same binary: the kernel, the types of its arguments, what divides them, its
constants, warps and stages are all that the compiler sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from triton.compiler import ASTSource

from astra_kernels._triton.launch import Launch, record
from astra_kernels._triton.tiles import Tile, watch
from tests.triton_kernels.aot_calls import Call

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
BY_16 = [["tt.divisibility", 16]]

Pair = tuple[tuple[str, Any], tuple[str, Any]]


@dataclass(frozen=True)
class Specialization:
    """A kernel as it is compiled for a chip: equal ones give the same binary.

    ``aligned``: which arguments 16 divides. It holds names in place of functions, to be sent to
    other processes.
    """

    module: str
    kernel: str
    capability: int
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int
    options: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(launch: Launch, capability: int) -> Specialization:
        types, constants, aligned = signature(launch)
        function = launch.kernel.fn
        return Specialization(
            *(function.__module__, function.__name__, capability),
            *(tuple(types.items()), tuple(constants.items()), tuple(index for (index,) in aligned)),
            *(launch.warps, launch.stages, tuple(launch.options.items())),
        )

    @property
    def source(self) -> ASTSource:
        function = getattr(import_module(self.module), self.kernel)
        aligned = {(index,): BY_16 for index in self.aligned}
        return ASTSource(function, dict(self.types), dict(self.constants), aligned)


@dataclass(frozen=True)
class Use:
    """A launch of ``call`` that leads to a specialization; ``bound``: bytes of shared memory that
    the tile's predicate allows for, None without one."""

    call: Call
    tile: Tile
    bound: int | None

    @property
    def pairs(self) -> set[Pair]:
        """Every two of the call's options, with the tile for one."""
        options = {**self.call.options, "tile": self.tile}
        return set(itertools.combinations(sorted(options.items(), key=lambda item: item[0]), 2))


Uses = dict[Specialization, list[Use]]


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types, compile-time constants and attributes of a launch's arguments."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    aligned: dict[tuple[int], Any] = {}
    parameters = launch.kernel.params
    for index, (parameter, value) in enumerate(zip(parameters, launch.args, strict=False)):
        name = parameter.name
        if value is None or (
            isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        ):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name], aligned[index,] = POINTERS[value.dtype], BY_16
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned[index,] = BY_16
    types.update(dict.fromkeys(launch.constants, "constexpr"))
    ordered = {parameter.name: types[parameter.name] for parameter in parameters}
    return ordered, constants, aligned


def specializations(calls: Iterable[Call], capability: int) -> Uses:
    """What calls are compiled to, in their order; of calls of one name the first counts."""
    named: dict[str, Call] = {}
    for call in calls:
        named.setdefault(call.name, call)
    uses: Uses = {}
    for call in named.values():
        with record(capability) as launches, watch() as problems:
            call.run()
        for launch in launches:
            tile = tile_of(launch)
            bound = next((p.shared_bytes(tile) for p in problems if tile in p.tiles()), None)
            uses.setdefault(Specialization.of(launch, capability), []).append(
                Use(call, tile, bound)
            )
    return uses


def tile_of(launch: Launch) -> Tile:
    named = launch.constants
    rows = named.get("ROWS", 0)
    columns = named.get("KEYS", named.get("COLUMNS", 0))
    return Tile(rows, columns, launch.warps, launch.stages, named.get("DEPTH", 0))


def subset(uses: Uses, names: Collection[str]) -> Uses:
    """What the calls of these names lead to, and enough more of each kernel that every two values
    of options which occur together in a call do so in what is left."""
    kept: set[Specialization] = set()
    for kernel in {key.kernel for key in uses}:
        keys = [key for key in uses if key.kernel == kernel]
        rows = [set().union(*(use.pairs for use in uses[key])) for key in keys]
        start = [i for i, k in enumerate(keys) if any(u.call.name in names for u in uses[k])]
        kept |= {keys[index] for index in covering(rows, start)}
    return {key: used for key, used in uses.items() if key in kept}


def covering(rows: Sequence[set[Pair]], start: Iterable[int] = ()) -> list[int]:
    """Indices of rows that between them have every pair that any row has.

    Greedy: those of ``start``, then always the row with most pairs that none had so far, of equals
    the first. The same rows give the same indices.
    """
    missing = [set(row) for row in rows]
    picked: list[int] = []

    def pick(index: int) -> None:
        picked.append(index)
        shown = set(missing[index])
        for row in missing:
            row -= shown

    for index in start:
        pick(index)
    while any(missing):
        pick(max(range(len(missing)), key=lambda index: len(missing[index])))
    return picked
