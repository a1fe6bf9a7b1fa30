"""What is needed of `astra_kernels` without torch: the C++ core, `_C`, and the cache's folder.

The transport and the command's start need these alone, and torch takes seconds to import.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

__all__ = ["_C", "cache_folder"]

_PACKAGE = "astra_kernels"


def _load(part: str) -> ModuleType:
    """One module of the package, where the package finds it when it is imported itself."""
    name = f"{_PACKAGE}.{part}"
    if name in sys.modules:
        return sys.modules[name]
    package = importlib.util.find_spec(_PACKAGE)  # found, not imported
    places = None if package is None else package.submodule_search_locations
    spec = importlib.machinery.PathFinder.find_spec(name, places)
    if places is None or spec is None or spec.loader is None:
        raise ModuleNotFoundError(
            f"No module named {name!r}: it is built by pip install", name=name
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def cache_folder() -> Path:
    """Where files are kept between runs: `astra_kernels._cache.cache_folder`."""
    folder: Path = _load("_cache").cache_folder()
    return folder


if TYPE_CHECKING:
    from astra_kernels import _C
else:
    _C = _load("_C")
