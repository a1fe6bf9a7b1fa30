"""Calls over one mesh take turns, whatever threads they come from."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch

from .transport import Mesh


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """Tensors that are made in here are ordinary ones, whatever mode the host is in: what a session
    keeps of a call in `torch.inference_mode` is written to by later calls outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Turn:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    def __enter__(self) -> None:
        if self._thread == threading.get_ident():
            raise RuntimeError("a call over this mesh runs in this thread already")
        self._lock.acquire()
        self._thread = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._thread = None
        self._lock.release()


_turns: weakref.WeakKeyDictionary[Mesh, _Turn] = weakref.WeakKeyDictionary()


def turn_of(mesh: Mesh) -> _Turn:
    """A context in which no other thread's call uses `mesh`.

    Raises RuntimeError where one of this thread's own does, which would wait for itself.
    """
    return _turns.setdefault(mesh, _Turn())
