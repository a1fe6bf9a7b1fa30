"""One fork server for all tests of a session, and the rows that they leave."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .forks import Forks
from .report import Row, write

_rows: list[Row] = []


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks(["tests.faults.rank:prepare"]) as server:
        yield server


@pytest.fixture
def record() -> Callable[[Row], None]:
    """Takes the row of a whole suite; a red row is written, too."""
    return _rows.append


def pytest_sessionfinish() -> None:
    path = os.environ.get("ASTRA_FAULTS_REPORT")
    if path and _rows:
        write(_rows, Path(path))
