"""The tables of README and docs, generated from the committed results.

    python -m bench.tables [--check]

Rewrites what stands between `<!-- table NAME -->` and `<!-- end -->`. With --check it changes
nothing; it names every table that is not what the results say, and then fails.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from bench.accuracy import tables as accuracy
from bench.gpt2 import tables as gpt2
from bench.latency import curve_tables
from bench.latency import tables as latency
from bench.lossy import tables as lossy
from bench.report import ROOT, goals
from bench.report import gpu as of_gpu
from bench.report import kernels as of_kernels
from bench.report import transport as of_transport
from bench.report.markdown import Table
from bench.service import tables as service
from bench.vision import tables as vision

TABLES: dict[str, Table] = {
    **latency.TABLES,
    **curve_tables.TABLES,
    **accuracy.TABLES,
    **gpt2.TABLES,
    **vision.TABLES,
    **of_transport.TABLES,
    **lossy.TABLES,
    **service.TABLES,
    **of_kernels.TABLES,
    **of_gpu.TABLES,
    **goals.TABLES,
}
kernels = of_gpu.kernels

_MARKED = re.compile(r"<!-- table (\w+) -->\n(.*?)<!-- end -->", re.S)


def pages(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def names(page: str) -> list[str]:
    """The tables that a page has a place for."""
    return [match[1] for match in _MARKED.finditer(page)]


def filled(page: str) -> str:
    """The page with its tables as the results have them.

    Raises:
        ValueError: it has a place for a table that is not defined.
    """

    def one(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            known = ", ".join(sorted(TABLES))
            raise ValueError(f"table: expected one of {known}, got {match[1]!r}")
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]].render()}\n<!-- end -->"

    return _MARKED.sub(one, page)


def stale(page: str) -> list[str]:
    """Names of the page's tables that differ from the results."""
    bodies = zip(_MARKED.finditer(page), _MARKED.finditer(filled(page)), strict=True)
    return [before[1] for before, after in bodies if before[2] != after[2]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if one is stale")
    options = parser.parse_args(arguments)
    failed = 0
    for path in pages():
        text = path.read_text("utf-8")
        if not options.check:
            path.write_text(filled(text), "utf-8")
            continue
        for name in stale(text):
            print(f"{path.relative_to(ROOT)}: table {name} is not what bench/results says")
            failed = 1
    if failed:
        print("python -m bench.tables writes them anew")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
