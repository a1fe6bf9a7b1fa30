"""What the tables are made with."""

import json
import statistics
from collections.abc import Sequence

from .results import RESULTS


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(report: dict) -> str:
    torch = report["versions"].get("torch")
    version = "" if torch is None else f", torch {torch}"
    return f"\n\n`{report['command'].strip()}` on {report['device']}{version}"


def spread(values: Sequence[float]) -> str:
    """The mean, and the deviation where there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"
