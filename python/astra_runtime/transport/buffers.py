"""Buffers used again: a bounded number of bytes, whatever sizes come and go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeVar

MAX_FREE: Final = 8 << 20  # bytes of free buffers that are kept

B = TypeVar("B")


class BufferPool(Generic[B]):
    """Free buffers by size. Those of the size that was needed longest ago are dropped first.

    make: a new buffer of so many bytes. Whoever shares a pool between threads holds a lock.
    """

    def __init__(self, make: Callable[[int], B], max_free: int = MAX_FREE) -> None:
        self._make = make
        self._max_free = max_free
        self._free: OrderedDict[int, list[B]] = OrderedDict()
        self.free_bytes = 0

    def take(self, size: int) -> B:
        free = self._free.get(size)
        if not free:
            return self._make(size)
        self._free.move_to_end(size)
        self.free_bytes -= size
        return free.pop()

    def give(self, buffer: B, size: int) -> None:
        self._free.setdefault(size, []).append(buffer)
        self._free.move_to_end(size)
        self.free_bytes += size
        while self.free_bytes > self._max_free:
            oldest, free = next(iter(self._free.items()))
            if free:
                free.pop()
                self.free_bytes -= oldest
            if not free:
                del self._free[oldest]
