"""Ahead-of-time compilation of recorded launches for chips that need not be there.

    python -m tests.triton_kernels.aot                       # every configuration, three chips
    python -m tests.triton_kernels.aot --decisive --capability 90  # what the goals are measured on
    python -m tests.triton_kernels.aot --few --capability 100      # one configuration of each kind

It prints a table, or with ``--json`` one object a line, and exits with 1 where a kernel does not
compile, spills registers at 128 channels or fewer, takes more shared memory than the chip has or
than the tile's predicate says, or, of those the goals are measured on, reads rows of tables other
than by asynchronous copies of 16 bytes. It does not run under TRITON_INTERPRET=1, where nothing is
compiled.

A launch is compiled as the JIT would: pointers aligned to 16 bytes, integers specialized on 1 and
on divisibility by 16. The compiler's report says how many registers a thread takes, how much shared
memory a block, and how much of the stack a thread: any is a spill.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from astra_kernels._triton.launch import Launch, record
from astra_kernels._triton.tiles import Tile, shared_memory, watch
from tests.triton_kernels.aot_calls import Call, all_calls, decisive, few
from tests.triton_kernels.sass import Loop, loops, resources

CAPABILITIES = (80, 90, 100)
CALLS: dict[str, Callable[[], Iterable[Call]]] = {
    "few": few,  # one configuration of each kind
    "decisive": decisive,  # those that the goals are measured on
    "all": all_calls,
}

# Bytes a thread may spill in a kernel that goes over the channels in steps.
STEPPED_SPILL = 16
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


@dataclass(frozen=True)
class Report:
    """What the compiler says of one kernel. ``stack`` bytes a thread; ``matrix`` is the matrix
    instruction it uses, "" for none."""

    registers: int
    stack: int
    shared: int
    matrix: str
    copies: int  # asynchronous copies, the mark of a pipelined loop
    loops: tuple[Loop, ...] = ()  # empty, too, where nobody asked for them


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
            types[name], aligned[index,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned[index,] = [["tt.divisibility", 16]]
    types.update(dict.fromkeys(launch.constants, "constexpr"))
    ordered = {parameter.name: types[parameter.name] for parameter in parameters}
    return ordered, constants, aligned


def compile_launch(launch: Launch, capability: int, *, listed: bool = True) -> Report:
    """``listed``: with what its loops consist of, which takes the disassembler a while."""
    types, constants, aligned = signature(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, **launch.options},
    )
    ptx = compiled.asm["ptx"]
    matrix = next((m for m in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if m in ptx), "")
    cubin = compiled.asm["cubin"]
    registers, stack = resources(cubin)
    copies = ptx.count("cp.async.c")
    inner = loops(cubin) if listed else ()
    return Report(registers, stack, compiled.metadata.shared, matrix, copies, inner)


@dataclass(frozen=True)
class Outcome:
    """One kernel of one call on one chip; ``wrong`` says what is not as it must be, if anything."""

    call: str
    kernel: str
    capability: int
    tile: str
    report: Report | None
    bound: int | None  # shared memory that the tile's predicate allows for
    seconds: float
    wrong: str

    @property
    def columns(self) -> int:
        return int(self.tile.split()[0].split("x")[1])

    @property
    def warps(self) -> int:
        return int(self.tile.split("warps=")[1].split()[0])


def check(call: Call, capability: int, kernels: Iterable[str] = ()) -> Iterator[Outcome]:
    """Compiles every kernel of a call, or those that are named."""
    with record(capability) as launches, watch() as problems:
        call.run()
    for launch in launches:
        if kernels and launch.kernel.fn.__name__ not in kernels:
            continue
        start = time.perf_counter()
        tile = tile_of(launch)
        bound = next((p.shared_bytes(tile) for p in problems if tile in p.tiles()), None)
        try:
            report, wrong = compile_launch(launch, capability, listed=call.decisive), ""
        except Exception as error:  # whatever the compiler raises is the outcome
            report, wrong = None, f"{type(error).__name__}: {error}"
        if report is not None:
            wrong = judge(report, call.channels, shared_memory(capability), bound)
            if call.decisive and not wrong:
                wrong = judge_loops(report.loops)
        seconds = time.perf_counter() - start
        name = launch.kernel.fn.__name__
        said = f"{tile.rows}x{tile.columns} warps={tile.warps} stages={tile.stages}"
        yield Outcome(call.name, name, capability, said, report, bound, seconds, wrong)


def tile_of(launch: Launch) -> Tile:
    named = launch.constants
    rows = named.get("ROWS", 0)
    columns = named.get("KEYS", named.get("COLUMNS", 0))
    return Tile(rows, columns, launch.warps, launch.stages, named.get("DEPTH", 0))


def judge(report: Report, channels: int, limit: int, bound: int | None) -> str:
    if report.stack > (STEPPED_SPILL if channels == 0 else 0) and channels <= 128:
        return f"{report.stack} bytes of registers spilled"
    if report.shared > limit:
        return f"{report.shared} bytes of shared memory, the chip has {limit}"
    if bound is not None and report.shared > bound:
        return f"{report.shared} bytes of shared memory, the predicate says at most {bound}"
    return ""


def judge_loops(loops: Iterable[Loop]) -> str:
    """Rows of tables come 16 bytes at a time, ahead of their use; nothing comes by two."""
    for number, loop in enumerate(loop for loop in loops if loop.matrix):
        narrow = loop.loads.get(2, 0) + loop.loads.get(4, 0) * (16 not in loop.copies)
        if narrow:
            return f"{narrow} loads of 2 or 4 bytes in loop {number}, to registers"
        if 16 not in loop.copies:
            return f"no asynchronous copy of 16 bytes in loop {number}"
    return ""


def check_all(job: tuple[str, int, str]) -> list[Outcome]:
    """In a worker: calls hold functions, which do not travel, so it looks its own up by name."""
    name, capability, which = job
    return list(check(next(call for call in CALLS[which]() if call.name == name), capability))


def run(capabilities: Iterable[int], which: str, processes: int) -> Iterator[Outcome]:
    names = dict.fromkeys(call.name for call in CALLS[which]())
    jobs = [(name, capability, which) for capability in capabilities for name in names]
    with ProcessPoolExecutor(processes) as pool:
        for outcomes in pool.map(check_all, jobs):
            yield from outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="compile the kernels ahead of time")
    parser.add_argument("--capability", type=int, action="append", help="80, 90, 100 by default")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--few", action="store_const", const="few", dest="which", default="all")
    which.add_argument("--decisive", action="store_const", const="decisive", dest="which")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    count = failed = 0
    for outcome in run(options.capability or CAPABILITIES, options.which, options.processes):
        count, failed = count + 1, failed + bool(outcome.wrong)
        if options.json:
            print(json.dumps(asdict(outcome)), flush=True)
        else:
            print(line(outcome), flush=True)
    print(f"{count} kernels compiled, {failed} not as they must be", file=sys.stderr)
    return 1 if failed else 0


def line(outcome: Outcome) -> str:
    said = f"sm_{outcome.capability} {outcome.kernel} {outcome.tile} ({outcome.call}): "
    if outcome.report is not None:
        got = outcome.report
        said += f"{got.registers} registers, {got.shared} B shared, {got.stack} B stack, "
        said += f"{got.matrix or 'no matrix instruction'}, {got.copies} async copies"
    said += f", {outcome.seconds:.1f} s"
    return f"{said} WRONG: {outcome.wrong}" if outcome.wrong else said


if __name__ == "__main__":
    sys.exit(main())
