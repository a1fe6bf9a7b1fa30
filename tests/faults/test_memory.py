"""Calls leave nothing behind, whatever carries them; `make soak` makes more of them."""

from __future__ import annotations

import pytest

from .calls import TRANSPORTS, run
from .forks import Forks


@pytest.mark.faults
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_calls_leave_nothing_behind(transport: str, forks: Forks) -> None:
    row = run(forks, [transport], 2000)
    assert row.survived == 1, row.failures
