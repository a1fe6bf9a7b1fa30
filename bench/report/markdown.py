"""What the tables of the pages are made with."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astra_runtime.contention import Contention

from .results import RESULTS

Report = dict[str, Any]
LISTS = ("cases", "rows", "faults", "demos")  # what a result has rows in


def load(name: str) -> Report | None:
    """A result by DEVICE/NAME; None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(report: Report) -> str:
    """The command, the device, and what disturbed the run, where the file knows it."""
    torch = report["versions"].get("torch")
    version = "" if torch is None else f", torch {torch}"
    contention = Contention(**report.get("contention", {"others": 0.0, "steal": 0.0}))
    note = f"; {contention}" if contention.disturbs else ""
    return f"\n\n`{report['command'].strip()}` on {report['device']}{version}{note}"


def sources(report: Report, rows: Sequence[Mapping[str, Any]]) -> str:
    """The same of rows that came from several runs, nothing of which was timed.

    A line for each command and commit. Where no row names any they are the file's.
    """
    measured = dict.fromkeys(_run(row["run"]) for row in rows if "run" in row)
    if not measured:
        measured = {_run(report): None}
    elif any("run" not in row for row in rows):
        measured["some rows, measured before: command and commit were not kept"] = None
    computed = dict.fromkeys(_run(row["computed"]) for row in rows if "computed" in row)
    lines = [f"- {run}" for run in measured]
    lines += [f"- {run}: bits and FLOPs" for run in computed if run not in measured]
    torch = report["versions"].get("torch")
    version = "" if torch is None else f", torch {torch}"
    return f"\n\nOn {report['device']}{version}:\n\n" + "\n".join(lines)


def _run(run: Mapping[str, Any]) -> str:
    return f"`{run['command'].strip()}`, commit {run['commit'][:7]}"


def spread(values: Sequence[float]) -> str:
    """The mean, and the deviation where there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


@dataclass(frozen=True)
class Table:
    """A table of a page: the results it is made of, and which of their rows it shows.

    Attributes:
        files: results by DEVICE/NAME. Those that are not there are left out; without any of them
            the table says that nothing was measured yet.
        make: markdown of the reports, one argument each.
        keep: of a case or row of a report, whether the table shows it; None: all of them.
        shown: the same in words, for the reader.
    """

    files: tuple[str, ...]
    make: Callable[..., str]
    keep: Callable[[dict[str, Any]], bool] | None = None
    shown: str = ""

    def render(self) -> str:
        reports = [report for name in self.files if (report := load(name)) is not None]
        if self.files and not reports:
            return "*not measured yet*"
        text = self.make(*map(self._kept, reports))
        if not self.shown:
            return text
        files = ", ".join(f"`bench/results/{name}.json`" for name in self.files)
        return f"{text}\n\nShown: {self.shown}. All rows are in {files}."

    def _kept(self, report: Report) -> Report:
        if self.keep is None:
            return report
        lists = {name: list(filter(self.keep, report[name])) for name in LISTS if name in report}
        return report | lists
