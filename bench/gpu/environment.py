"""What machine this is: `python -m bench.gpu.environment` prints it as one line of JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.tree import ROOT

PTXAS = ROOT / "build" / "gpu-ptxas" / "ptxas"  # where `bench.gpu --prepare` puts one
CUDA_FOLDERS = (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", "/usr/local/nvidia")
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "pytest", "pytest-xdist", "pytest-timeout"),
    *("vector-quantize-pytorch", "flashinfer-python", "nvidia-cudnn-cu13"),
)
# What nvidia-smi says of clocks, power and temperature: reasons why one run is slower than another.
ASKED = (
    *("driver_version", "name", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.draw", "power.limit", "temperature.gpu", "clocks_event_reasons.active", "pstate"),
)


def device_folder(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100"."""
    model = re.search(r"[A-Z]{1,3}\d{2,4}", name.upper().replace("RTX ", "RTX"))
    return model[0].lower() if model else re.sub(r"\W+", "-", name).lower()


def find_tool(name: str) -> str | None:
    """A program on PATH, or in one of CUDA's folders, which often are not."""
    folders = [f"{folder}/bin" for folder in CUDA_FOLDERS if folder]
    folders += [f"{folder}/{name}" for folder in CUDA_FOLDERS if folder]  # compute-sanitizer's own
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return shutil.which(name, path=path)


def cuda_ptxas() -> str | None:
    """An assembler that is not the one that Triton brings: brought along, else CUDA's own."""
    if os.access(PTXAS, os.X_OK):
        return str(PTXAS)
    for folder in CUDA_FOLDERS:
        path = Path(folder) / "bin" / "ptxas"
        if folder and path.is_file():
            return str(path)
    return None


def first_line(words: Sequence[str], pattern: str = "") -> str | None:
    """The first line of a program's output that has the pattern; None where there is none."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in done.stdout.splitlines() if re.search(pattern, line)]
    return lines[0].strip() if lines else None


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks, power, temperature, as nvidia-smi has them now."""
    tool = find_tool("nvidia-smi")
    if tool is None:
        return None
    query = [tool, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    line = first_line(query)
    if line is None or line.count(",") != len(ASKED) - 1:
        return None
    return dict(zip(ASKED, (value.strip() for value in line.split(",")), strict=True))


def describe_torch() -> dict[str, Any]:
    import torch

    about: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        about |= {
            "device": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory": device.total_memory,
            "processors": device.multi_processor_count,
            "l2_cache": getattr(device, "L2_cache_size", None),
            "cudnn": torch.backends.cudnn.version(),
        }
    return about


def describe_triton() -> dict[str, Any]:
    """triton_key decides whether kernels that were compiled elsewhere are found in a cache."""
    import triton
    from triton.runtime import cache

    bundled = sorted(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"))
    programs = [str(path) for path in bundled if os.access(path, os.X_OK)]
    return {
        "triton": triton.__version__,
        "triton_key": cache.triton_key(),
        "ptxas": {path: first_line([path, "--version"], "release") for path in programs},
    }


def describe() -> dict[str, Any]:
    about: dict[str, Any] = {"device": None, "python": sys.version.split()[0]}
    about["cores"] = len(os.sched_getaffinity(0))
    for part in (describe_torch, describe_triton):
        about |= attempt(part)
    ptxas = cuda_ptxas()
    about["cuda_ptxas"] = ptxas and {ptxas: first_line([ptxas, "--version"], "release")}
    about["compute_sanitizer"] = find_tool("compute-sanitizer")
    about["nvidia_smi"] = nvidia_smi()
    about["versions"] = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about["versions"][package] = importlib.metadata.version(package)
    return about


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part says; the reason where it cannot: the rest is worth knowing all the same."""
    try:
        return part()
    except (ImportError, AttributeError, RuntimeError, OSError) as reason:
        return {part.__name__: f"{type(reason).__name__}: {reason}"[:300]}


if __name__ == "__main__":
    print(json.dumps(describe()))
