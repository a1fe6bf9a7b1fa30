from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Also where the machine has more: results depend on the number. Other folders' tests have
    what the command says, since two processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "auto"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param
