"""Runs the libFuzzer targets of csrc/fuzz, which `make fuzz` has built, and counts executions.

    python -m tests.faults.fuzz --targets build/fuzz/csrc/fuzz --runs 100000000 [--report FILE]

Every target starts from a few inputs that the encoder in `astra_runtime.wire` makes. A target that
breaks a promise or meets a sanitizer leaves the input in the corpus folder and ends the run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import astra_kernels as ak
from astra_runtime import wire
from astra_runtime.wire import Frame, Hello

from .report import Row, write

# Share of all runs, and the longest input.
TARGETS = {"header": (0.3, 60), "hello": (0.3, 40), "facts": (0.2, 400), "codes": (0.2, 160)}
RUNS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


def seeds() -> dict[str, list[bytes]]:
    """Well-formed inputs, so that not every run ends at the first byte."""
    header = bytes(Frame(3).stamp(5, 0xDEADBEEF, 3, 1)[: wire.HEADER_SIZE])
    bye = bytes(wire.bye(9, 1))
    run = bytes(range(16))
    facts = [{}, {"model": "ab12", "plan": "weights balanced"}, {"a": "", "ü": "三 ranks"}]
    codes = [
        bytes([bits, *int.to_bytes(1 << bits >> 1 or 1, 2, "little"), count, isa])
        + ak.pack(np.zeros(count, np.int32), bits).tobytes()
        for bits, count, isa in ((1, 8, 0), (3, 21, 1), (10, 40, 2), (16, 70, 2))
    ]
    return {
        "header": [header + header, header + bye, bye + bye],
        "hello": [Hello(4, 2, 0, run).encode(), Hello(2, 1, 0).encode("no one")[:30]],
        "facts": [wire.encode_fields(f).rstrip(b"\0") + bytes(3) for f in facts],
        "codes": codes,
    }


def fuzz(folder: Path, corpus: Path, target: str, runs: int, seed: int) -> tuple[int, str]:
    """Executions of one target, and the last words of one that failed."""
    inputs = corpus / target
    inputs.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds()[target]):
        (inputs / f"seed-{number}").write_bytes(data)
    command = [
        *(str(folder / f"fuzz_{target}"), f"-runs={runs}", f"-seed={seed}", str(inputs)),
        *(f"-max_len={TARGETS[target][1]}", "-print_final_stats=1", "-timeout=10"),
        *("-rss_limit_mb=2048", f"-artifact_prefix={corpus}/{target}-failed-"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = RUNS.search(done.stderr)
    last = "" if done.returncode == 0 else f"{target}: {done.stderr[-2000:]}"
    return int(found[1]) if found else 0, last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz/corpus"))
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    row = Row("fuzz", f"make fuzz FUZZ_RUNS={given.runs}", given.seed)
    start = time.monotonic()
    for target, (share, _) in TARGETS.items():
        wanted = round(given.runs * share)
        runs, failed = fuzz(given.targets, given.corpus, target, wanted, given.seed)
        print(f"{target}: {runs:,} executions{'; FAILED' if failed else ''}", flush=True)
        row.tried += runs
        row.survived += runs - bool(failed)
        row.extra[target] = runs
        if failed:
            row.failures.append(failed)
            print(failed, file=sys.stderr)
    row.extra["seconds"] = time.monotonic() - start
    if given.report is not None:
        write([row], given.report)
    return 1 if row.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
