"""Everything that needs a GPU, in two commands of five minutes each.

    python -m bench.gpu --prepare                   # beforehand, where there is a network
    python -m bench.gpu --part A --output DIR       # right? the decisive cases, the engine
    python -m bench.gpu --part B --output DIR       # tests, sanitizers, the rest, tuned tiles
    python -m bench.gpu --rehearse                  # both, with Triton's interpreter for a GPU

Stages have time limits of their own, and leave time for what comes after them; one that fails does
not stop the others, and what was measured until a limit is kept. DIR gets, while the stages run,
`summary.json` (stage, result, seconds, last lines), `log.txt` (their output) and the results, as
`<device>/kernels.json`, `engine.json` and `kernels_tuned.json`. Compiled kernels and results are
also kept in build/gpu-cache: part B goes on with what part A measured of the same commit. The exit
status is 0 if no stage failed.

The tree may be a copy without its history: --commit says then what it is of. Needs torch with CUDA,
Triton, pytest; cmake, ninja and pybind11 where astra_kernels._C is not built. No network: what
--prepare made (build/gpu-wheels, build/gpu-ptxas, astra_kernels/_C.*.so) is brought along with the
tree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu import plan, prepare
from bench.gpu.plan import CACHE, PARTS, Group, Setup
from bench.gpu.running import Result, Stage, run_group, skipped
from bench.tree import ROOT, commit

KEPT_OF_LOG = 2_000_000  # characters of a process's output in log.txt
LEAST_LIMIT = 5.0  # seconds; with less a stage is not begun
REHEARSED = 10.0  # times the limits: an interpreter is slow

PLANS: dict[str, Callable[[Setup], list[Group]]] = {"A": plan.part_a, "B": plan.part_b}


class Record:
    """The files of a run, written again and again: what there is when it is ended is kept."""

    def __init__(self, output: Path, logs: Path, about: Mapping[str, Any]) -> None:
        self.output, self.logs, self.about = output, logs, dict(about)
        self.results: list[Result] = []
        self.began: list[str] = []  # stages, in order

    def keep(self) -> None:
        summary = {**self.about, "environment": self.environment()}
        summary["running"] = sorted(set(self.began) - {one.stage for one in self.results})
        summary["stages"] = [asdict(one) for one in self.results]
        write(self.output / "summary.json", json.dumps(summary, indent=1) + "\n")
        write(self.output / "log.txt", self.log())
        for path in self.output.glob("*/*.json"):
            kept = CACHE / "results" / path.parent.name / path.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(path, kept)

    def environment(self) -> Any:
        path = self.logs / "environment.0"
        with contextlib.suppress(OSError, ValueError, IndexError):
            return json.loads(path.read_text().strip().splitlines()[-1])
        return None

    def log(self) -> str:
        texts = []
        for name in self.began:
            for path in sorted(self.logs.glob(f"{name}.*")):
                with contextlib.suppress(OSError):
                    text = path.read_text(errors="replace")[-KEPT_OF_LOG:]
                    texts.append(f"==== {path.name}\n{text}\n")
        return "".join(texts)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def take_up(output: Path, at: str) -> None:
    """Results of the same commit that an earlier part left, for this one to go on with."""
    for path in (CACHE / "results").glob("*/kernels*.json"):
        here = output / path.parent.name / path.name
        if not here.exists() and json.loads(path.read_text())["commit"] == at != "unknown":
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, here)


def run_part(name: str, args: argparse.Namespace, output: Path) -> list[Result]:
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="astra-gpu-"))
    output.mkdir(parents=True, exist_ok=True)
    at = args.commit or commit()
    if name == "A" and not args.only:
        shutil.rmtree(CACHE / "results", ignore_errors=True)
    else:
        take_up(output, at)
    setup = Setup(output, len(os.sched_getaffinity(0)), args.rehearse)
    env = plan.environment(scratch, at, bool(args.rehearse))
    record = Record(output, scratch, {"part": name, "commit": at, "command": sys.argv[1:]})
    groups = chosen(PLANS[name](setup), args.only)
    scale = REHEARSED if args.rehearse else 1.0
    seconds = scale * (args.minutes * 60 if args.minutes else PARTS[name])
    for place, group in enumerate(groups):
        left = seconds - (time.monotonic() - began)
        later = sum(max(stage.least for stage in group) for group in groups[place + 1 :])
        limit = left - scale * later
        run: list[tuple[Stage, float]] = []
        for stage in group:
            record.began.append(stage.name)
            if stage.missing is not None or limit < LEAST_LIMIT:
                record.results.append(skipped(stage, stage.missing or "no time was left"))
            else:
                run.append((stage, min(scale * stage.seconds, limit)))
        record.results += run_group(run, env, scratch, record.keep)
        record.keep()
        for result in record.results[-len(group) :]:
            show(result)
    shutil.rmtree(scratch, ignore_errors=True)
    return record.results


def chosen(groups: Sequence[Group], only: Sequence[str] | None) -> list[Group]:
    groups = [tuple(s for s in group if not only or s.name in only) for group in groups]
    return [group for group in groups if group]


def show(result: Result) -> None:
    counted = ", ".join(f"{number} {word}" for word, number in result.counts.items())
    print(f"{result.stage:17s} {result.result:9s} {result.seconds:6.1f} s  {counted}", flush=True)
    lines = [*result.wrong[:10], *(result.last_lines if result.result != "passed" else ())]
    for line in lines + ([result.note] if result.note else []):
        print(f"    {line}", flush=True)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=tuple(PARTS), help="one part alone; both by default")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--minutes", type=float, help="for a part, instead of its own limit")
    parser.add_argument("--commit", help="of the tree, where it is a copy without its history")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages alone")
    parser.add_argument(
        "--rehearse",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="without a GPU: small shapes in Triton's interpreter; each N-th call, case and test",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the stages and stop")
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="build the extension for another Python, download wheels and a ptxas, and stop",
    )
    parser.add_argument("--python", default="3.12", help="the version that --prepare is for")
    args = parser.parse_args(given)
    names = {s.name for part in PLANS.values() for g in part(Setup(args.output, 4)) for s in g}
    unknown = set(args.only or ()) - names
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}")
    return args


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    if args.prepare:
        return prepare.prepare(args.python)
    parts = [args.part] if args.part else list(PARTS)
    args.output = args.output.resolve()
    if args.dry_run:
        for name in parts:
            setup = Setup(args.output, len(os.sched_getaffinity(0)), args.rehearse)
            for group in chosen(PLANS[name](setup), args.only):
                for stage in group:
                    print(f"{name} {stage.name:17s} {stage.seconds:4.0f} s  {stage.shown}")
        return 0
    results = []
    for name in parts:
        # each part has files of its own where both are run
        results += run_part(name, args, args.output if args.part else args.output / name.lower())
    late = [one.stage for one in results if one.result in ("failed", "timed out")]
    failed = [name for name in late if name != "tuned"]  # it takes what time is left
    print(f"failed: {', '.join(failed) or 'nothing'}; {args.output}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
