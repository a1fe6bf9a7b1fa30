"""What a machine without a network needs brought along: the extension built, wheels, a ptxas."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.environment import PTXAS, first_line
from bench.gpu.plan import WHEELS
from bench.tree import ROOT

# vector-quantize-pytorch, a baseline of `encode`, and what it needs beside numpy, torch and torch's
# own needs, which must not be shadowed; all pure Python.
PACKAGES = (
    *("vector-quantize-pytorch==1.32.0", "einx", "einops", "frozendict", "loguru"),
    "torch-einops-utils",
)
# The assembler of CUDA 13.1: those of 12.8, which Triton 3.6 brings, and of 13.0 are known to have
# made wrong code for Hopper (fla-org/flash-linear-attention#1262). Drivers of CUDA 13 run its code.
COMPILER = "nvidia-cuda-nvcc==13.1.115"
PTXAS_IN_WHEEL = "nvidia/cu13/bin/ptxas"


def prepare(version: str) -> int:
    """Builds astra_kernels._C for a Python of that version and downloads what it needs.

    The extension takes this machine's C++ library: the other machine's must be as new.
    """
    there = download(PACKAGES, version, WHEELS)
    print(f"{len(list(WHEELS.glob('*.whl')))} wheels in {WHEELS.relative_to(ROOT)}")
    there = bring_ptxas(version) and there
    python = interpreter(version)
    if python is None:
        print(f"python{version} and its headers are not here: the extension is built over there")
        return int(not there)
    print(f"built {build(python)}")
    return int(not there)


def download(packages: Sequence[str], version: str, folder: Path) -> bool:
    """Wheels of packages, without what they need, into a folder; False: not all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    words += ("--only-binary=:all:", "--python-version", version, *packages)
    return subprocess.run(words).returncode == 0


def bring_ptxas(version: str) -> bool:
    """Takes `PTXAS` out of its package."""
    with tempfile.TemporaryDirectory() as folder:
        if not download([COMPILER], version, Path(folder)):
            print(f"no ptxas: {COMPILER} could not be downloaded; CUDA's own is used over there")
            return False
        (wheel,) = Path(folder).glob("*.whl")
        unpack(wheel, PTXAS_IN_WHEEL, PTXAS)
    print(f"{PTXAS.relative_to(ROOT)}: {first_line([str(PTXAS), '--version'], 'release')}")
    return True


def unpack(wheel: Path, member: str, out: Path) -> None:
    """One program of a wheel, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, part.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    part.chmod(0o755)
    os.replace(part, out)


def interpreter(version: str) -> str | None:
    """A Python of that version with its headers."""
    code = (
        "import os, sys, sysconfig;"
        f"assert '.'.join(map(str, sys.version_info[:2])) == '{version}';"
        "assert os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h'));"
        "print(sys.executable)"
    )
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    managed = sorted(root.glob(f"versions/{version}*/bin/python"))
    for candidate in (shutil.which(f"python{version}"), *(str(path) for path in managed)):
        if candidate is not None:
            done = subprocess.run((candidate, "-c", code), capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout.strip()
    return None


def build(python: str) -> Path:
    """The extension for that interpreter, in place. Returns its path."""
    import pybind11

    tool = tools()
    folder = ROOT / "build" / f"gpu-{Path(python).parent.parent.name}"
    configure = (
        *(tool["cmake"], "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={tool['ninja']}",
        *("-DCMAKE_BUILD_TYPE=Release", "-DASTRA_BUILD_PYTHON=ON", "-DASTRA_BUILD_TESTS=OFF"),
        *("-DBUILD_SHARED_LIBS=OFF", f"-DPython_EXECUTABLE={python}"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )
    target = ROOT / "astra_kernels"
    for words in (
        configure,
        (tool["cmake"], "--build", str(folder), "--parallel", str(len(os.sched_getaffinity(0)))),
        (tool["cmake"], "--install", str(folder), "--component", "python", "--prefix", str(target)),
    ):
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    ask = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    suffix = subprocess.run((python, "-c", ask), check=True, capture_output=True, text=True).stdout
    return target / f"_C{suffix.strip()}"


def tools() -> dict[str, str]:
    """cmake and ninja, from their packages or PATH."""
    places = {}
    for name, directory in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        try:
            path = Path(getattr(importlib.import_module(name), directory)) / name
        except (ImportError, AttributeError):
            path = Path()
        places[name] = str(path) if path.is_file() else shutil.which(name) or name
    return places
