"""pyproject.toml allows no version lower than what `make test-lowest` tries."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNTRIED = {"torch", "faiss-cpu"}  # torch by hand; faiss is a baseline that no core test needs


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / name).read_text(), re.M))


def bounds() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    for extra in ("models", "gpu", "security", "serve", "test"):
        wanted += extras[extra]
    return dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", one).groups() for one in wanted)  # type: ignore[union-attr]


def numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return (*parts, *[0] * (3 - len(parts)))


@pytest.mark.parametrize("package", sorted(bounds().keys() - UNTRIED))
def test_the_lowest_version_allowed_is_the_one_that_is_tried(package: str) -> None:
    assert numbers(pins("constraints-lowest.txt")[package]) == numbers(bounds()[package])
