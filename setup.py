"""Builds the C++ core and its Python module with CMake and Ninja; pyproject.toml has the rest."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_tool(name: str, directory: str) -> str:
    """Path of a build tool: the one its Python package brings (build isolation), or PATH's."""
    try:
        candidate = Path(getattr(importlib.import_module(name), directory)) / name
    except (ImportError, AttributeError):
        candidate = Path()
    found = str(candidate) if candidate.is_file() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is needed to build astra_kernels._C: pip install {name}")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        ninja = find_tool("ninja", "BIN_DIR")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        werror = "ON" if os.environ.get("ASTRA_WERROR") == "ON" else "OFF"
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DASTRA_BUILD_PYTHON=ON",
            "-DASTRA_BUILD_TESTS=OFF",
            "-DBUILD_SHARED_LIBS=OFF",
            f"-DASTRA_WERROR={werror}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        parallel = str(len(os.sched_getaffinity(0)))
        subprocess.run([cmake, "--build", str(build), "--parallel", parallel], check=True)
        subprocess.run(
            [cmake, "--install", str(build), "--component", "python", "--prefix", target.parent],
            check=True,
        )


setup(ext_modules=[Extension("astra_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
