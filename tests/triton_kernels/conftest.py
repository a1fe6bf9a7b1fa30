"""The Triton kernels beside their references: in Triton's interpreter on the CPU, or compiled, on a
GPU, with `--device cuda`. The interpreter's bf16 dot is wrong (Triton 3.6 to 3.9)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def on_device(device: str) -> Iterator[None]:
    """Tensors are made on the device that was asked for."""
    torch.manual_seed(0)
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if request.param == "bfloat16" and device == "cpu":
        pytest.skip("the interpreter cannot multiply bf16")
    return getattr(torch, request.param)
