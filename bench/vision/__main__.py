"""What codes cost a ViT that needs its remote tokens: digits, trained from nothing.

    python -m bench.vision [--groups goals noise …] [--part validation] [--quick]

An image is two of scikit-learn's digits side by side, 8 × 16 pixels, and its label the larger of
them, so that no digit alone says it. 32 patches of 2 × 2 pixels are cut in shards: of four ranks,
each has two lines of pixels of both digits. (The easy case: the left digit.) Who wrote the test
digits wrote none of the others. One model a seed is trained on one device, then adapted to codes,
and as controls to dense exchange and to none, with the same images and steps. The learning rate,
λ and the space of the smallest code were chosen on validation images, of the first seed. Writes
accuracy_vision.json, after each group of rows; some 40 minutes of one core. A run that was stopped
goes on with `--add --keep FOLDER --groups` and what is missing. `--wide` looks at a model twice as
wide, whose MLPs are four times as wide as it: accuracy_vision_wide.json, some 40 minutes more.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from astra_runtime.console import say
from bench.report import RESULTS, command_line, cores, quiet_transformers, write

from .data import PARTS, TASKS, compose
from .model import TOKENS
from .rows import FULL, LEAST, QUICK, WIDE, Size, groups, wide
from .study import Seed, goal, measured

LARGE, SMALL = (76.8, 0.9), (2457.6, 3.6)  # compression, points permitted


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.vision", description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=list(groups()))
    parser.add_argument("--wide", action="store_true", help="the wider model, group goals only")
    parser.add_argument("--part", choices=["test", "validation"], default="test")
    parser.add_argument("--seeds", type=int, help=f"how many ({FULL.seeds})")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"of adaptation ({FULL.adaptation}; {FULL.longest} of rows with goals)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny and meaningless: a test")
    parser.add_argument("--keep", type=Path, help="folder that keeps the pre-trained models")
    parser.add_argument("--add", action="store_true", help="keep the file's rows of other groups")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> Path:
    options, started = arguments(given), time.time()
    quiet_transformers()
    torch.set_num_threads(1)
    size, of_groups = QUICK if options.quick else FULL, groups()
    if options.wide:
        size, of_groups = size if options.quick else WIDE, wide()
    chosen = options.groups or list(of_groups)
    if options.steps:
        size = replace(size, adaptation=options.steps, longest=options.steps)
    size = replace(size, seeds=options.seeds or size.seeds)
    name = "accuracy_vision" + "_wide" * options.wide + "_quick" * options.quick
    path = options.output / f"cpu-{cores()}core" / f"{name}.json"
    rows, before = earlier(path, chosen) if options.add else ([], 0)
    seeds = seeds_of(size, options.part, options.keep)
    for group in chosen:
        for row in of_groups[group]:
            rows.append({"group": group, **measured(row, seeds)})
            say(line(rows[-1], time.time() - started))
        write(  # after each group, so that an interrupted run keeps what it has
            name,
            [],
            command=command_line("bench.vision", given),
            packages=("torch", "numpy", "transformers", "scikit-learn"),
            results=options.output,
            extra={
                "tasks": {"largest": "the larger of two digits", "left": "the left digit"},
                "part": options.part,
                "digits_of_parts": {part: stop - start for part, (start, stop) in PARTS.items()},
                "tokens": TOKENS,
                "size": asdict(size),
                "complete": {row["group"] for row in rows} == set(of_groups),
                "seconds": before + round(time.time() - started),
                "threads": torch.get_num_threads(),
                "goals": [
                    goal(row, *(SMALL if row["codes"] == LEAST.name else LARGE))
                    for row in rows
                    if row["group"] == "goals"
                ],
                "rows": rows,
            },
        )
    return path


def earlier(path: Path, anew: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The file's rows of other groups than those measured anew, and the seconds they took."""
    if not path.is_file():
        return [], 0
    report = json.loads(path.read_text())
    return [row for row in report["rows"] if row["group"] not in anew], report["seconds"]


def seeds_of(size: Size, part: str, keep: Path | None) -> list[Seed]:
    """Every seed's pre-trained models. Each seed has test images of its own, which all its rows
    share, so that a mean over seeds is one over more images."""
    seeds = []
    for seed in range(size.seeds):
        tests = {task: compose(part, size.test, task, seed=77 + seed) for task in TASKS}
        seeds.append(Seed(size, seed, tests, keep))
    return seeds


def line(row: dict[str, Any], seconds: float) -> str:
    kind = "adapted" if row["adapted"] else "calibrated"
    return (
        f"{seconds:5.0f} s  {row['group']}: {row['task']} {row['codes']} {kind} "
        f"N={row['world_size']} λ={row['noise']} β={row['commitment']} "
        f"{row['class_token']} lost={row['lost']}: "
        f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f} "
        f"(exact {row['exact']:.2f}, int8 {row['int8']:.2f}, local {row['local_only']:.2f})"
    )


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
