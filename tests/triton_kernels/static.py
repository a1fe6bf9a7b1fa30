"""What the compiler makes of the decisive kernels, kept as a table: what slows one shows in it.

    python -m tests.triton_kernels.static            # compares; status 1 where one is slower
    python -m tests.triton_kernels.static --write    # the table's rows of this version of Triton

The table, static.json, has a row a kernel and version of Triton, for an H100 (sm_90). `loops` are
the innermost ones that multiply matrices, in the kernel's order (whole tiles, then the ragged end).
Of each loop:

    instructions   of a warp, for a tile of keys (attend) or a step of channels (lookup_linear)
    row_bytes      that the program copies, more than 4 at a time, for each of the tile's columns:
                   for attend bytes of key, value and angles of a token
    copies, loads  of a thread, asynchronous to shared memory and to registers, by width in bytes
    partial        copies that only some threads make: of codes, of one row of angles
    multiply_adds  FFMA: a polynomial in the loop shows here
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import triton

from tests.triton_kernels.aot import Outcome, check
from tests.triton_kernels.aot_calls import decisive
from tests.triton_kernels.sass import Loop

# The kernels that take the time; those around them are a few microseconds.
MULTIPLYING = ("attend", "nearest", "lookup_linear_kernel")

TABLE = Path(__file__).with_name("static.json")
CAPABILITY = 90

# A loop may grow by this part before it counts as slower: the assembler's whims.
TOLERANCE = 0.02

Row = dict[str, Any]


def outcomes(names: Iterable[str] | None = None) -> Iterator[Outcome]:
    """Compiles the decisive calls, or those of them that are named."""
    wanted = None if names is None else set(names)
    calls = [call for call in decisive() if wanted is None or call.name in wanted]
    return check(calls, CAPABILITY, MULTIPLYING)


def row_of(outcome: Outcome) -> Row:
    report = outcome.report
    assert report is not None
    return {
        "triton": triton.__version__,
        "case": outcome.call,
        "kernel": outcome.kernel,
        "tile": outcome.tile,
        "registers": report.registers,
        "spilled": report.stack,
        "shared": report.shared,
        "loops": [figures(loop, outcome) for loop in report.loops if loop.matrix],
    }


def figures(loop: Loop, outcome: Outcome) -> Row:
    wide = sum(width * n for width, n in loop.copies.items() if width > 4) * 32 * outcome.warps
    return {
        "instructions": loop.instructions,
        "row_bytes": round(wide / outcome.columns),
        "copies": {str(width): n for width, n in loop.copies.items()},
        "partial": {str(width): n for width, n in loop.partial_copies.items()},
        "loads": {str(width): n for width, n in loop.loads.items()},
        "multiply_adds": loop.count("FFMA"),
    }


def slower(row: Row, kept: Row) -> list[str]:
    """What is worse than the table says of a kernel; its first loop is the one that takes time."""
    pairs = [(name, row[name], kept[name]) for name in ("registers", "spilled", "shared")]
    for loop, was in zip(row["loops"][:1], kept["loops"][:1], strict=True):
        pairs += [(name, loop[name], was[name]) for name in ("instructions", "row_bytes")]
    return [
        f"{row['case']}: {row['kernel']} (Triton {row['triton']}): {name} {was} -> {now}"
        for name, now, was in pairs
        if now > was * (1 + TOLERANCE)
    ]


def key(row: Row) -> tuple[str, str, str]:
    return row["triton"], row["case"], row["kernel"]


def read() -> dict[tuple[str, str, str], Row]:
    return {key(row): row for row in json.loads(TABLE.read_text())} if TABLE.exists() else {}


def write(fresh: Iterable[Row]) -> None:
    """Replaces this version's rows; one line a row."""
    kept = [row for row in read().values() if row["triton"] != triton.__version__]
    table = sorted([*kept, *fresh], key=lambda row: row["triton"])
    TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in table) + "\n]\n")


def compare(fresh: Iterable[Row]) -> Iterator[str]:
    table = read()
    for row in fresh:
        if key(row) not in table:
            yield f"{row['case']}: {row['kernel']} (Triton {row['triton']}) is not in {TABLE.name}"
        else:
            yield from slower(row, table[key(row)])


def line(row: Row) -> str:
    loops = "; ".join(
        f"{loop['instructions']} instructions, {loop['row_bytes']} B a column"
        for loop in row["loops"]
    )
    return (
        f"{row['case']}: {row['kernel']} {row['tile']}: {row['registers']} registers, "
        f"{row['spilled']} spilled, {row['shared']} B shared; {loops}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="static figures of the decisive kernels")
    parser.add_argument("--write", action="store_true", help=f"rewrite the rows in {TABLE.name}")
    parser.add_argument("--only", action="append", metavar="CASE", help="a case by its name")
    options = parser.parse_args()
    fresh, wrong = [], []
    for outcome in outcomes(options.only):
        if outcome.wrong:
            wrong.append(f"{outcome.call}: {outcome.kernel}: {outcome.wrong}")
        if outcome.report is not None:
            fresh.append(row_of(outcome))
            print(line(fresh[-1]), flush=True)
    if options.write and not wrong:
        write(fresh)
    else:
        wrong += compare(fresh)
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
