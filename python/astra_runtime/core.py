"""The C++ core, `_C`, without the package that it lies in, which imports torch.

The transport and the command's help need the core alone, and torch takes seconds to import.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__all__ = ["_C"]

_PACKAGE, _NAME = "astra_kernels", "astra_kernels._C"


def _load() -> ModuleType:
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    package = importlib.util.find_spec(_PACKAGE)  # found, not imported
    places = None if package is None else package.submodule_search_locations
    spec = importlib.machinery.PathFinder.find_spec(_NAME, places)
    if places is None or spec is None or spec.loader is None:
        raise ModuleNotFoundError(
            f"No module named {_NAME!r}: it is built by pip install", name=_NAME
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module  # where the package finds it, when it is imported
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from astra_kernels import _C
else:
    _C = _load()
