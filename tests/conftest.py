"""What tests of several packages share."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test draws the same numbers, whatever has run before it in its process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what others draw from
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def short_inputs_stand_for_long_ones(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests of codes use a few tokens, which an engine would compute without any.

    The command's own processes take inputs as they are: its tests say `--halo`.
    """
    parts = set(request.node.path.relative_to(request.config.rootpath).parts)
    if parts & {"runtime", "bench"} and not parts & {"cli", "deploy"}:
        from astra_runtime import costs

        monkeypatch.setattr(costs, "EXACT_TOKENS", 0)
