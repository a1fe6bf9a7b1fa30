"""Runs benchmarks and rewrites the tables: `make bench`.

    python -m bench                  what `make bench` runs; it says first what it leaves out
    python -m bench pack exchange    these alone
    python -m bench --list           every benchmark, and the command that makes each table

Nothing else should run on the machine. A benchmark that fails or cannot run here does not stop the
others; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

from bench import tables
from bench.accuracy import corpora
from bench.link import switch
from bench.registry import BENCHES, Bench, Run, chosen, writers
from bench.report import ROOT, Watch

CLANG = ("clang++", "clang++-19", "clang++-16", "clang++-14")  # as the Makefile tries
RIVALS = ROOT / ".venv-rivals/bin/python"
FIGURE = "latency_vit-base_1024"  # that the pages show
AFTERWARDS = (Run(f"bench.latency.plots {FIGURE}"), Run("bench.tables"), Run("bench.guard"))


def lacking(bench: Bench) -> str:
    """What a benchmark needs and this machine has not; an empty string where it has all."""
    import torch

    checks: dict[str, Callable[[], str]] = {
        "root": switch.unavailable,
        "GPU": lambda: "" if torch.cuda.is_available() else "no GPU",
        "clang": lambda: "" if any(map(shutil.which, CLANG)) else "no clang++",
        "corpora": _corpora,
        "codebooks": lambda: "",  # those of `calibrate`, which comes before
        "rivals": lambda: "" if RIVALS.exists() else "no rivals: make rivals",
    }
    reasons = (checks[need]() for need in bench.needs)
    return "; ".join(filter(None, reasons))


def _corpora() -> str:
    missing = [name for name in corpora.DOMAINS if not corpora.available(name)]
    if not missing:
        return ""
    return f"no text {', '.join(missing)}: python -m bench.accuracy corpora --fetch"


def overview(benches: Sequence[Bench]) -> str:
    """What is run and what is left out: minutes, and the tables that each makes."""
    others = [bench for bench in BENCHES if bench not in benches]
    lines = [f"runs, about {sum(bench.minutes for bench in benches)} min:"]
    lines += map(_line, benches)
    if others:
        minutes = sum(bench.minutes for bench in others)
        lines += ["", f"leaves out, about {minutes} min (python -m bench NAME …):"]
        lines += map(_line, others)
    return "\n".join(lines)


def _line(bench: Bench) -> str:
    needs = f" [needs {', '.join(bench.needs)}]" if bench.needs else ""
    results = {result for run in bench.runs for result in run.writes}
    names = [name for name, table in tables.TABLES.items() if results.intersection(table.files)]
    of_tables = f"\n{'':27}tables: {', '.join(names)}" if names else ""
    return f"  {bench.name:17}{bench.minutes:4} min  {bench.about}{needs}{of_tables}"


def origins() -> str:
    """Of every table the page and the commands that make it."""
    pages = {
        name: page.relative_to(ROOT).as_posix()
        for page in tables.pages()
        for name in tables.names(page.read_text("utf-8"))
    }
    lines = []
    for name, table in tables.TABLES.items():
        lines.append(f"{name} ({pages.get(name, 'on no page')})")
        commands = [run.line for result in table.files for run in writers(result)]
        lines += [f"    {command}" for command in commands or ["from all results"]]
    return "\n".join(lines)


def execute(run: Run) -> bool:
    """Runs a command from the root of the repository; whether it succeeded."""
    words = shlex.split(run.command)
    if words[0] != "make":
        words = [sys.executable, "-m", *words]
    print(f"== {run.line}", flush=True)
    return subprocess.run(words, cwd=ROOT).returncode == 0


def measure(bench: Bench) -> bool:
    """All runs of a benchmark, until one fails; says what disturbed them."""
    watch = Watch()
    succeeded = all(map(execute, bench.runs))  # a run may need the one before
    contention = watch.contention()
    if contention.disturbs:
        print(f"== {bench.name}: {contention}; nothing else should run beside it", flush=True)
    return succeeded


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of benchmarks; see --list")
    parser.add_argument("--list", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    try:
        benches = chosen(options.names)
    except ValueError as error:
        parser.error(str(error))
    print(f"{overview(benches)}\n\npython -m bench --list has the commands.", flush=True)
    if options.list:
        print(f"\ntables, and the commands that make them:\n{origins()}")
        return 0
    failed = []
    for bench in benches:
        reason = lacking(bench)
        if reason:
            print(f"== {bench.name} cannot run here: {reason}", flush=True)
            failed.append(bench.name)
        elif not measure(bench):
            failed.append(bench.name)
    failed += [run.command for run in AFTERWARDS if not execute(run)]
    if failed:
        print(f"failed, or could not run here: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
