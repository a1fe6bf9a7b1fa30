"""Launching kernels: on which device, with which tile, or only writing down what would be launched.

Every launcher asks ``capability`` for the chip and goes through ``launch``. Under ``record`` no
kernel runs: the launches are collected for a chip that need not be there, so that ahead-of-time
compilation sees the very arguments and constants that the launchers choose.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from astra_kernels._dispatch import runs_triton
from astra_kernels._recording import current, starting
from astra_kernels._replay import suspended
from astra_kernels._triton.compiled import start

# The compiler fuses multiplications and additions; said aloud because the default changes.
OPTIONS = {"enable_fp_fusion": True}

# Programs along the second and third axis of a grid.
LARGEST_GRID = 65_535

# Programs of a launch.
LARGEST_LAUNCH = 2**31 - 1

# Compute capability assumed for a device that is none of ours, the interpreter's CPU for one.
DEFAULT_CAPABILITY = 90
DEFAULT_PROCESSORS = 132


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: positional arguments, constants, warps and stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    options: dict[str, Any]


class _Recording(threading.local):
    """Of one thread: what others launch meanwhile runs."""

    capability: int | None = None
    launches: list[Launch]


_recording = _Recording()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def runnable(device: torch.device) -> bool:
    """Kernels run on NVIDIA GPUs from sm_80 on, and on the CPU in the interpreter."""
    return runs_triton(device) or interpreted() or _recording.capability is not None


def capability(device: torch.device) -> int:
    """Compute capability as one number: 80, 90, 100 …"""
    if _recording.capability is not None:
        return _recording.capability
    return _device_capability(device.index) if device.type == "cuda" else DEFAULT_CAPABILITY


@functools.cache
def _device_capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@functools.cache
def _device_processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; an H100's where there is no device."""
    return _device_processors(device.index) if device.type == "cuda" else DEFAULT_PROCESSORS


def cdiv(size: int, part: int) -> int:
    """Parts that hold ``size``; Triton's own are functions of the compiler's, and cost 0.5 µs."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not smaller; 0 of 0."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


@contextlib.contextmanager
def record(capability: int) -> Iterator[list[Launch]]:
    """Collects launches for a chip of that compute capability instead of running them."""
    _recording.capability, _recording.launches = capability, []
    try:
        with suspended():
            yield _recording.launches
    finally:
        _recording.capability = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    device: torch.device,
    warps: int,
    stages: int,
    all_registers: bool = False,
    **constants: Any,
) -> None:
    """Runs a kernel on ``device``; an empty grid is nothing to do.

    ``all_registers``: the assembler would rather spill a few bytes than let fewer programs share a
    multiprocessor; this tells it not to.
    """
    options = {**OPTIONS, "maxnreg": 255} if all_registers else OPTIONS
    if _recording.capability is not None:
        _recording.launches.append(Launch(kernel, grid, args, constants, warps, stages, options))
        return
    if 0 in grid:
        return
    if max(grid[1:], default=0) > LARGEST_GRID:
        raise ValueError(
            f"astra_kernels: impl='triton' takes at most {LARGEST_GRID} batch rows times KV heads "
            f"(or groups) in a call, got {max(grid[1:])}; split the batch"
        )
    if math.prod(grid) > LARGEST_LAUNCH:  # Triton's launcher would start nothing, silently
        raise ValueError(
            f"astra_kernels: impl='triton' takes at most {LARGEST_LAUNCH} programs in a launch, "
            f"got a grid of {' x '.join(map(str, grid))}; split the batch"
        )
    with starting, current(device):
        options = {"num_warps": warps, "num_stages": stages, **options}
        start(kernel, grid, args, constants, options, device.index)
