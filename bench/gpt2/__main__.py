"""Accuracy per bit after NAVQ adaptation: a GPT-2 trained here, over spaces, bits and settings.

    python -m bench.gpt2 [--wide] [--quick] [--resume]

Trains a small GPT-2 from scratch (`model.py`), adapts it and a codebook to each other with
`astra_runtime.train.finetune`, and measures the perplexity of N ranks, with equal shards, over
the tokens after the first shard, on text of a domain that was trained on and of one that nothing
ever saw. It takes about 25 minutes on one core that does nothing else. --resume does the rest of a
run that was cut short, with the same numbers. --wide takes a model of twice the width, beside
which coding costs less, and fewer rows (no settings), in accuracy_gpt2_wide.json.

Time allows one pre-training only, kept in the cache folder, and short adaptations. Seeds differ in
codebook, adaptation data, noise and losses; the evaluation windows are the same. The controls had
the same data and steps: `exact` is the better of the original and of the model adapted with exact
attention, local-only (`dropped`) is adapted to see nothing of other shards, at a learning rate of
its own, as it has more to learn. Settings (λ, β, K), losses and other N are measured on windows of
kind "revised", which need remote tokens most.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from astra_runtime import Codebook
from astra_runtime.console import say
from bench.gpt2.measure import Bench, Codes, Size, Task, described
from bench.gpt2.model import Shape
from bench.report import RESULTS, command_line, cores, quiet_transformers, write

FULL = Size(
    Shape(),
    bits=(
        Codes("differential", 4, 1024),
        Codes("kv", 4, 1024),
        Codes("hidden", 4, 1024),
        Codes("differential", 1, 1024),
        Codes("kv", 1, 256),
        Codes("hidden", 1, 256),
    ),
    plain=(
        Codes("differential", 8, 64),
        Codes("differential", 16, 256),
        Codes("kv", 16, 256),
        Codes("hidden", 16, 256),
    ),
    base=Codes("differential", 4, 1024),
)
WIDE = Size(
    Shape(width=256, head=64, steps=1500),
    bits=(
        Codes("transform", bits=80),
        Codes("transform", bits=64),
        Codes("kv", 8, 256),
    ),
    plain=(),
    base=Codes("kv", 8, 256),
    steps=60,
)
QUICK = Size(
    Shape(
        width=32,
        layers=2,
        head=8,
        vocabulary=300,
        tokens=128,
        steps=2,
        per_domain=5_000,
        seen=("documentation",),
        unseen="source",
    ),
    bits=(Codes("differential", 2, 16), Codes("kv", 2, 16), Codes("hidden", 2, 16)),
    plain=(Codes("kv", 1, 16),),
    base=Codes("differential", 2, 16),
    steps=2,
    sweep_steps=1,
    calibration=4,
    windows=2,
    seeds=2,
    noise=(0.0, 0.1),
    commitment=(0.0, 1e-4),
    codewords=(8, 16),
    ranks=(2, 4),
)


def tasks(size: Size) -> list[Task]:
    """All groups of rows, the most wanted first."""
    wanted, revised, base = size.bits[: size.first], {"kinds": ["revised"]}, size.base

    def setting(group: str, codes: Codes, **changes: float) -> Task:
        return Task(group, codes, steps=size.sweep_steps, changes=changes, options=revised)

    rows = [
        Task("control", book, adapted=adapted)
        for book in (Codebook.dense(), Codebook.local_only())
        for adapted in (True, False)
    ]
    rows += [Task("bits", codes, adapted=adapted) for codes in wanted for adapted in (False, True)]
    if size is WIDE:
        return rows + [Task("ranks", codes, options={"ranks": 2}) for codes in wanted[:1]]
    rows += [Task("lost", codes, options={**revised, "lost": 0.05}) for codes in wanted]
    rows += [Task("ranks", base, options={**revised, "ranks": n}) for n in size.ranks]
    rows += [setting("noise", base, noise=noise) for noise in size.noise]
    rows += [setting("commitment", base, commitment=weight) for weight in size.commitment]
    rows += [setting("codewords", replace(base, codewords=k)) for k in size.codewords]
    for codes in size.bits[size.first :]:
        rows += [Task("bits", codes, adapted=adapted) for adapted in (False, True)]
    rows += [Task("bits", codes, adapted=False) for codes in size.plain]
    return [*rows, Task("control", Codebook.dense("int8"), adapted=False)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.gpt2", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds: that everything runs")
    parser.add_argument("--resume", action="store_true", help="go on where the result file ends")
    parser.add_argument("--wide", action="store_true", help="another model, fewer rows")
    parser.add_argument("--output", help="name of the result")
    parser.add_argument("--results", type=Path, help="another folder than bench/results")
    options = parser.parse_args(arguments)
    quiet_transformers()
    size, start = QUICK if options.quick else WIDE if options.wide else FULL, time.monotonic()
    output = options.output or ("accuracy_gpt2_wide" if options.wide else "accuracy_gpt2")
    file = (options.results or RESULTS) / f"cpu-{cores()}core" / f"{output}.json"
    before: dict[str, Any] = {"rows": [], "done": 0, "seconds": 0.0}
    if options.resume:
        before = json.loads(file.read_text())
    bench, rows = Bench(size), list(before["rows"])
    for done, task in enumerate(tasks(size), 1):
        if done <= before["done"]:
            continue
        group = bench.run(task)
        rows += group
        seconds = before["seconds"] + time.monotonic() - start
        for row in group:
            say(f"{seconds:5.0f} s  {line(row)}")
        write(
            output,
            [],
            command=command_line("bench.gpt2", arguments),
            packages=("torch", "numpy", "transformers", "tokenizers"),
            extra={
                "rows": rows,
                "done": done,
                "model": described(bench),
                "threads": torch.get_num_threads(),
                "seconds": seconds,
            },
            results=options.results,
        )


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['group']} {row['space']} {row['groups']}x{row['codewords']} "
        f"adapted={row['adapted']} {row['domain']}/{row['kind']} N={row['world_size']}: "
        f"{row['perplexity']:.2f} ± {row['perplexity_std']:.2f}, over exact "
        f"{row['ratio_to_exact']:.3f}, local-only {row['dropped_over_exact']:.3f}"
    )


if __name__ == "__main__":
    main()
