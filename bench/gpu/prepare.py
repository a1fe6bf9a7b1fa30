"""What a machine without a network needs brought along: the extension built, and wheels."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu.plan import WHEELS
from bench.tree import ROOT

# vector-quantize-pytorch, a baseline of `encode`, and what it needs beside numpy, torch and torch's
# own needs, which must not be shadowed; all pure Python.
PACKAGES = (
    *("vector-quantize-pytorch==1.32.0", "einx", "einops", "frozendict", "loguru"),
    "torch-einops-utils",
)


def prepare(version: str) -> int:
    """Builds astra_kernels._C for a Python of that version and downloads the wheels for it.

    The extension takes this machine's C++ library: the other machine's must be as new.
    """
    wheels = download(version)
    python = interpreter(version)
    if python is None:
        print(f"python{version} and its headers are not here: the extension is built over there")
        return int(not wheels)
    print(f"built {build(python)}")
    return int(not wheels)


def download(version: str) -> bool:
    WHEELS.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(WHEELS)]
    words += ("--only-binary=:all:", "--python-version", version, *PACKAGES)
    status = subprocess.run(words).returncode
    print(f"{len(list(WHEELS.glob('*.whl')))} wheels in {WHEELS.relative_to(ROOT)}")
    return status == 0


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
