"""The Triton kernels beside their references: in Triton's interpreter on the CPU, or compiled, on a
GPU, with `--device cuda`. The interpreter's bf16 dot is wrong (Triton 3.6 to 3.9)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch.utils._device import _device_constructors

from astra_kernels import _replay as replay

# Not imported here: whether kernels are interpreted is settled when Triton is first imported.
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


# torch lists once which functions take the default device, by identity: before any is replaced.
_device_constructors()


@pytest.fixture(autouse=True)
def on_device(device: str) -> Iterator[None]:
    """Tensors are made on the device that was asked for."""
    torch.manual_seed(0)
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def no_call_is_kept() -> None:
    """Tests choose strategies and tiles, which other tests' calls were not made with."""
    replay.forget()


@pytest.fixture(autouse=True)
def few_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter one program runs after the other: work is not split to fill a chip."""
    if device == "cpu":
        from astra_kernels._triton import launch

        monkeypatch.setattr(launch, "DEFAULT_PROCESSORS", 4)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        dtypes = [torch.float32, torch.float16]
        if metafunc.config.getoption("--device") == "cuda":
            dtypes.append(torch.bfloat16)
        metafunc.parametrize("dtype", dtypes, ids=str)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or an integer that is no code and no count."""

    def poisoning(plain):
        def fresh(*args, **kwargs):
            tensor = plain(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(math.nan)
            return tensor.fill_(119 if tensor.dtype.itemsize == 1 else -119)

        return fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
