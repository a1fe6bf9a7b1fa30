"""Ahead-of-time compilation of recorded launches for chips that need not be there.

    python -m tests.triton_kernels.aot                       # what `make test-aot` compiles
    python -m tests.triton_kernels.aot --all                 # every configuration, three chips
    python -m tests.triton_kernels.aot --decisive --capability 90  # what the goals are measured on
    python -m tests.triton_kernels.aot --few --capability 100      # one configuration of each kind

Without an option every configuration is compiled for sm_90 by the Triton that the known GPUs run.
For other chips, and by another Triton, those are that show every two values of a call's options
which occur together, beside the decisive ones, one of each kind, and what spilled before.

It prints what is wrong, with ``--verbose`` all, or with ``--json`` one object a line, and exits
with 1 where a kernel does not compile, spills registers at 128 channels or fewer, takes more shared
memory than the chip has or than the tile's predicate says, or, of those the goals are measured on,
reads rows of tables other than by asynchronous copies of 16 bytes. It does not run under
TRITON_INTERPRET=1, where nothing is compiled.

A launch is compiled as the JIT would: pointers aligned to 16 bytes, integers specialized on 1 and
on divisibility by 16; launches that differ in nothing that the compiler sees, once. Triton's cache
(~/.triton/cache) keeps what was compiled. The compiler's report says how many registers a thread
takes, how much shared memory a block, and how much of the stack a thread: any is a spill.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from astra_kernels._triton.attend_tiles import TRITON_3_6
from astra_kernels._triton.tiles import shared_memory
from tests.triton_kernels.aot_calls import Call, all_calls, decisive, few, spilled_before
from tests.triton_kernels.aot_launches import Specialization, Use, Uses, specializations, subset
from tests.triton_kernels.sass import Loop, loops, resources

CAPABILITIES = (80, 90, 100)

# The chip of the known GPUs.
KNOWN = 90

CALLS: dict[str, Callable[[], Iterable[Call]]] = {
    "few": few,  # one configuration of each kind
    "decisive": decisive,  # those that the goals are measured on
    "all": all_calls,
    "chosen": all_calls,  # or a part of them that stands for all, see ``wanted``
}

# Bytes a thread may spill in a kernel that goes over the channels in steps.
STEPPED_SPILL = 16


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


@dataclass(frozen=True)
class Compilation:
    """What came of compiling: a report, or the compiler's ``error``."""

    report: Report | None
    error: str
    seconds: float
    cached: bool


def compile_kernel(key: Specialization, *, listed: bool = True) -> tuple[Report, bool]:
    """What the compiler says of it, and whether Triton had it in its cache.

    ``listed``: with what its loops consist of, which takes the disassembler a while.
    """
    cached: list[bool] = []
    knobs = triton.knobs.compilation
    knobs.listener = lambda *, cache_hit, **_: cached.append(cache_hit)
    try:
        compiled = triton.compile(
            key.source,
            target=GPUTarget("cuda", key.capability, 32),
            options={"num_warps": key.warps, "num_stages": key.stages, **dict(key.options)},
        )
    finally:
        knobs.listener = None
    ptx = compiled.asm["ptx"]
    matrix = next((m for m in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if m in ptx), "")
    cubin = compiled.asm["cubin"]
    registers, stack = resources(cubin)
    copies = ptx.count("cp.async.c")
    inner = loops(cubin) if listed else ()
    return Report(registers, stack, compiled.metadata.shared, matrix, copies, inner), all(cached)


def attempt(job: tuple[Specialization, bool]) -> Compilation:
    """In a worker; whatever the compiler raises is an outcome."""
    key, listed = job
    start = time.perf_counter()
    try:
        report, cached = compile_kernel(key, listed=listed)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Compilation(None, message, time.perf_counter() - start, False)
    return Compilation(report, "", time.perf_counter() - start, cached)


@dataclass(frozen=True)
class Outcome:
    """One kernel of one call on one chip; ``wrong`` says what is not as it must be, if anything.

    Calls that lead to the same kernel share its report and seconds.
    """

    call: str
    kernel: str
    capability: int
    tile: str
    report: Report | None
    bound: int | None  # shared memory that the tile's predicate allows for
    seconds: float
    cached: bool  # Triton had compiled it before
    wrong: str

    @property
    def columns(self) -> int:
        return int(self.tile.split()[0].split("x")[1])

    @property
    def warps(self) -> int:
        return int(self.tile.split("warps=")[1].split()[0])


def outcome(key: Specialization, use: Use, done: Compilation) -> Outcome:
    wrong = done.error
    if done.report is not None:
        limit = shared_memory(key.capability)
        wrong = judge(done.report, use.call.channels, limit, use.bound, use.call.spill)
        if use.call.decisive and not wrong:
            wrong = judge_loops(done.report.loops)
    tile = use.tile
    said = f"{tile.rows}x{tile.columns} warps={tile.warps} stages={tile.stages}"
    return Outcome(
        *(use.call.name, key.kernel, key.capability, said, done.report, use.bound),
        *(done.seconds, done.cached, wrong),
    )


def outcomes(uses: Uses, mapped: Callable[..., Iterable[Any]] = map) -> Iterator[list[Outcome]]:
    """Of every specialization, one for each of its uses; ``mapped``: a pool's, or Python's own."""
    jobs = [(key, any(use.call.decisive for use in used)) for key, used in uses.items()]
    for (key, used), done in zip(uses.items(), mapped(attempt, jobs), strict=True):
        yield [outcome(key, use, done) for use in used]


def check(
    calls: Iterable[Call], capability: int, kernels: Collection[str] = ()
) -> Iterator[Outcome]:
    """Compiles every kernel of calls, or those that are named."""
    uses = specializations(calls, capability)
    if kernels:
        uses = {key: used for key, used in uses.items() if key.kernel in kernels}
    for same in outcomes(uses):
        yield from same


def judge(report: Report, channels: int, limit: int, bound: int | None, spill: int = 0) -> str:
    allowed = STEPPED_SPILL if channels == 0 else spill
    if report.stack > allowed and channels <= 128:
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


def wanted(capability: int, which: str) -> tuple[Uses, int]:
    """What is compiled for a chip, and how many kernels there are."""
    uses = specializations(CALLS[which](), capability)
    if which != "chosen" or (capability == KNOWN and TRITON_3_6):
        return uses, len(uses)
    always = {call.name for call in (*few(), *decisive(), *spilled_before())}
    return subset(uses, always), len(uses)


@dataclass
class Tally:
    """Kernels so far."""

    compiled: int = 0
    cached: int = 0
    wrong: int = 0

    def add(self, same: list[Outcome]) -> None:
        """``same``: the outcomes of one kernel."""
        self.cached += same[0].cached
        self.compiled += not same[0].cached
        self.wrong += any(outcome.wrong for outcome in same)

    def __str__(self) -> str:
        return f"{self.compiled} compiled, {self.cached} cached, {self.wrong} not as they must be"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="compile the kernels ahead of time")
    parser.add_argument("--capability", type=int, action="append", help="80, 90, 100 by default")
    which = parser.add_mutually_exclusive_group()
    for name, said in (
        ("few", "one configuration of each kind"),
        ("decisive", "what the goals are measured on"),
        ("all", "every configuration, for every chip"),
    ):
        which.add_argument(
            f"--{name}", action="store_const", const=name, dest="which", default="chosen", help=said
        )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--verbose", action="store_true", help="every kernel, not the wrong alone")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def main() -> int:
    options = parse()
    # The workers are forked: no thread of torch's must be at work.
    torch.set_num_threads(1)
    start, wrong = time.perf_counter(), 0
    chips = options.capability or CAPABILITIES
    selected = {capability: wanted(capability, options.which) for capability in chips}
    with ExitStack() as stack:
        mapped: Callable[..., Iterable[Any]] = map
        if options.processes > 1:
            mapped = stack.enter_context(ProcessPoolExecutor(options.processes)).map
        for capability, (uses, distinct) in selected.items():
            tally = Tally()
            for same in outcomes(uses, mapped):
                tally.add(same)
                show(same, options)
            wrong += tally.wrong
            calls = len({use.call.name for used in uses.values() for use in used})
            say(f"sm_{capability}: {len(uses)} of {distinct} kernels, of {calls} calls: {tally}")
    used = sum(os.times()[:4]) / 60
    minutes = (time.perf_counter() - start) / 60
    say(f"Triton {triton.__version__}: {minutes:.1f} minutes, {used:.1f} of the processors")
    return 1 if wrong else 0


def show(same: Iterable[Outcome], options: argparse.Namespace) -> None:
    for each in same:
        if options.json:
            print(json.dumps(asdict(each)), flush=True)
        elif options.verbose or each.wrong:
            print(line(each), flush=True)


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def line(outcome: Outcome) -> str:
    said = f"sm_{outcome.capability} {outcome.kernel} {outcome.tile} ({outcome.call}): "
    if outcome.report is not None:
        got = outcome.report
        said += f"{got.registers} registers, {got.shared} B shared, {got.stack} B stack, "
        said += f"{got.matrix or 'no matrix instruction'}, {got.copies} async copies, "
    said += "cached" if outcome.cached else f"{outcome.seconds:.1f} s"
    return f"{said} WRONG: {outcome.wrong}" if outcome.wrong else said


if __name__ == "__main__":
    sys.exit(main())
