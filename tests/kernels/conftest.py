from __future__ import annotations

import pytest
import torch

torch.set_num_threads(2)  # also where the machine has more: results depend on the number


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "auto"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param
