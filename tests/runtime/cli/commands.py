"""Words for tests of commands, and commands in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WORDS = [f"w{i}" for i in range(96)]
PROMPT = " ".join(WORDS[i * 7 % 96] for i in range(30))
TEXT = " ".join(WORDS[i * i % 96] for i in range(600))


def astra(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "astra_runtime", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"ASTRA_CACHE": str(home / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def model_options(home: Path) -> list[str]:
    return ["--model", str(home / "model"), "--codebook", str(home / "codebook")]
