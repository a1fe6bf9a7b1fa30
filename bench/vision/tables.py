"""Tables of accuracy_vision.json. Each takes the file's content and returns markdown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bench.report.markdown import Table, source, table

CONTROLS = ["exact", "int8", "local-only"]
COLUMNS = ["bits/token/block", "fewer bits", "FLOPs over ideal", "accuracy (%)", "below exact"]
FLOPS = 1.25  # over the ideal, up to which a goal counts


def _figures(row: dict[str, Any]) -> list[str]:
    """COLUMNS, then CONTROLS."""
    return [
        f"{row['bits_per_token_block']:g}",
        f"{row['compression']:.1f}×",
        f"{row['flops_over_ideal']:.2f}",
        f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}",
        f"{row['below_exact']:.2f} ± {row['below_exact_std']:.2f}",
        *(f"{row[name]:.2f}" for name in ("exact", "int8", "local_only")),
    ]


def _adapted(row: dict[str, Any]) -> str:
    return f"adapted, {row['steps']} steps" if row["adapted"] else "calibrated"


def _of(report: dict[str, Any], *groups: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["group"] in groups]


def _seeds(report: dict[str, Any]) -> str:
    rows = report["rows"]
    if not rows:
        return ""
    size, part, seeds = report["size"], report["part"], rows[0]["n_seeds"]
    right = [row["accuracy_mean"] / 100 for row in rows]
    error = max(100 * math.sqrt(p * (1 - p) / (seeds * size["test"])) for p in right)
    return (
        f"\n\n{seeds} seeds, mean ± their deviation, each on {size['test']} {part} images of its "
        f"own (standard error of a mean at most {error:.2f} points, of a difference less); "
        f"adapted in {size['adaptation']} steps of {size['batch']} images, in {size['longest']} "
        "where goals are."
    )


def vision(report: dict[str, Any]) -> str:
    """Accuracy against bits, by task, adapted and with k-means alone; and the goals."""
    once = {
        (row["task"], row["codes"], row["adapted"], row["steps"]): row
        for row in _of(report, "goals", "bits")
    }
    order = ("task", "space", "bits_per_token_block", "adapted")
    rows = [
        [row["task"], row["codes"], _adapted(row), *_figures(row)]
        for row in sorted(once.values(), key=lambda row: [row[name] for name in order])
    ]
    head = ["label", "codes", "", *COLUMNS, *CONTROLS]
    return table(head, rows) + _goals(report) + _seeds(report) + source(report)


def _verdict(goal: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Whether a goal is reached, and at a cost at which it counts."""
    if not goal["reached"]:
        return "**not reached**"
    costs = [
        row["flops_over_ideal"]
        for row in rows
        if all(row[name] == goal[name] for name in ("task", "codes", "world_size", "below_exact"))
    ]
    over = f", **at {costs[0]:.2f} of the ideal FLOPs, {FLOPS} permitted**"
    return "reached" + (over if costs[0] > FLOPS else "")


def _goals(report: dict[str, Any]) -> str:
    lines = [
        f"- {goal['task']}: at {goal['row_compression']:.1f}× ({goal['codes']}) "
        f"with N={goal['world_size']} {goal['below_exact']:.2f} points below exact, "
        f"{goal['permitted']} permitted at {goal['compression']}×: "
        f"{_verdict(goal, report['rows'])}"
        + ("" if goal["counts"] else " (does not count: remote tokens matter too little)")
        for goal in report["goals"]
    ]
    return "\n\n" + "\n".join(lines)


def vision_wide(report: dict[str, Any]) -> str:
    """The goals' rows of the wider model, by number of ranks."""
    rows = [
        [f"{row['world_size']}", row["codes"], _adapted(row), *_figures(row)]
        for row in _of(report, "goals")
    ]
    head = ["ranks", "codes", "", *COLUMNS, *CONTROLS]
    return table(head, rows) + _goals(report) + _seeds(report) + source(report)


def vision_training(report: dict[str, Any]) -> str:
    """What one setting of the training does: noise, commitment, codewords, the class token."""
    names: dict[str, Callable[[dict[str, Any]], str]] = {
        "noise": lambda row: f"λ = {row['noise']:g}",
        "commitment": lambda row: f"β = {row['commitment']:g}",
        "codewords": lambda row: f"K = {row['codewords']}",
        "class token": lambda row: f"{row['class_token']} class token",
    }
    rows = [
        [name(row), row["codes"], *_figures(row)]
        for group, name in names.items()
        for row in _of(report, group)
    ]
    return table(["", "codes", *COLUMNS, *CONTROLS], rows) + _seeds(report) + source(report)


def vision_ranks(report: dict[str, Any]) -> str:
    """Trained for four ranks or for any number, run as N; and with frames lost."""
    rows = [
        [
            f"{row['world_size']}",
            "N = {}".format(row["ranks"][0]) if row["ranks"][0] == row["ranks"][1] else "any N",
            row["codes"],
            f"{row['lost']:.0%}",
            *_figures(row),
        ]
        for row in _of(report, "ranks", "loss")
    ]
    head = ["ranks", "trained for", "codes", "lost", *COLUMNS, *CONTROLS]
    return table(head, rows) + _seeds(report) + source(report)


def _settings(row: dict[str, Any]) -> bool:
    """The ends of each sweep."""
    ends = {"noise": (0, 1), "commitment": (0, 0.25), "codewords": (64, 4096)}
    group = row["group"]
    return group == "class token" or (group in ends and row[group] in ends[group])


def _runs(row: dict[str, Any]) -> bool:
    """Trained for any number of ranks; of what was trained for four the ends."""
    return row["ranks"][0] != row["ranks"][1] or row["world_size"] in (2, 8)


RESULT = ("cpu-2core/accuracy_vision",)
TABLES = {
    "vision": Table(RESULT, vision),
    "vision_wide": Table(("cpu-2core/accuracy_vision_wide",), vision_wide),
    "vision_training": Table(RESULT, vision_training, _settings, "the ends of each sweep"),
    "vision_ranks": Table(
        RESULT,
        vision_ranks,
        _runs,
        "what was trained for any N, and for N = 4 its runs by 2 and 8 ranks",
    ),
}
