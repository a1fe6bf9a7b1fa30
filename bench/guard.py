"""What has become slower: ratios to the best baseline, beside those of a commit.

    python -m bench.guard [--against HEAD] [--strict]

A ratio is measured side by side with its baselines in one run, so it may be compared between runs
where times may not. Lists every case whose ratio fell by more than 10 %; with --strict it then
fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import RESULTS, ROOT

TOLERANCE = 0.10


class Slower(NamedTuple):
    """A case whose ratio fell."""

    file: str
    name: str
    impl: str
    before: float
    now: float


def ratios(report: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (case["name"], case["impl"]): case["ratio"]
        for case in report.get("cases", ())
        if case.get("ratio")
    }


def slower(before: Mapping[str, Any], now: Mapping[str, Any], file: str) -> Iterator[Slower]:
    """Cases of both reports whose ratio fell by more than the tolerance."""
    old = ratios(before)
    for key, ratio in ratios(now).items():
        if key in old and ratio < (1 - TOLERANCE) * old[key]:
            yield Slower(file, *key, old[key], ratio)


def committed(path: Path, revision: str) -> Mapping[str, Any] | None:
    name = f"{revision}:{path.relative_to(ROOT).as_posix()}"
    done = subprocess.run(["git", "-C", str(ROOT), "show", name], capture_output=True)
    return None if done.returncode else json.loads(done.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="HEAD", metavar="REVISION")
    parser.add_argument("--strict", action="store_true", help="fail if anything is slower")
    options = parser.parse_args(arguments)
    fallen: list[Slower] = []
    compared = 0
    for path in sorted(RESULTS.glob("*/*.json")):
        before = committed(path, options.against)
        if before is None:
            continue
        now = json.loads(path.read_text())
        compared += len(ratios(now).keys() & ratios(before).keys())
        fallen += slower(before, now, path.relative_to(RESULTS).as_posix())
    for case in fallen:
        print(
            f"SLOWER {case.file}: {case.name} ({case.impl}): {case.before:.3g}× before, "
            f"{case.now:.3g}× now ({case.now / case.before - 1:+.0%})"
        )
    print(f"{len(fallen)} of {compared} ratios fell by more than {TOLERANCE:.0%}")
    return int(bool(fallen) and options.strict)


if __name__ == "__main__":
    raise SystemExit(main())
