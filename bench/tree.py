"""The tree that this is: where it lies, and its commit. Needs nothing but Python and git."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """The commit this tree is at, with "-dirty" if files under version control were changed.

    A copy of the tree without its history has it from `$BENCH_COMMIT`, else it is "unknown".
    """
    named = os.environ.get("BENCH_COMMIT")
    if named:
        return named

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    same = (":!bench/results", ":!*.md")  # what cannot change a measurement
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *same)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
