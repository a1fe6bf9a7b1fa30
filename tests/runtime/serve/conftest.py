"""The model of most tests of the service."""

from __future__ import annotations

from typing import Any

import pytest

from ..models import tiny


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")
