"""Transfers of torch.distributed, and a thread that waits for them."""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

from torch import Tensor

from astra_runtime.transport.options import MAX_SECONDS

EXIT_SECONDS: Final = 1.0


class Transfer(NamedTuple):
    """A tensor on its way. `work` has torch.distributed's `wait`."""

    work: Any
    tensor: Tensor
    rank: int


class Waiter:
    """Waits for transfers, in order, in a thread of its own.

    gloo's waits cannot be woken, a signal handler does not run in them, and one that ends before
    its transfer breaks the connection. `ended(transfer, error)` is called in the thread.
    """

    def __init__(self, ended: Callable[[Transfer, RuntimeError | None], None]) -> None:
        self._ended = ended
        self._queue: SimpleQueue[tuple[Transfer, float] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, transfer: Transfer, deadline: float) -> None:
        if self._thread is None:
            name = "astra-torch-wait"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
            _waiters.add(self)
        self._queue.put((transfer, deadline))

    def stop(self) -> None:
        self._queue.put(None)

    def join(self, seconds: float) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            transfer, deadline = item
            try:
                wait(transfer, deadline)
            except RuntimeError as error:
                self._ended(transfer, error)
            else:
                self._ended(transfer, None)
            del item, transfer  # a buffer must not live until the next transfer


_waiters: weakref.WeakSet[Waiter] = weakref.WeakSet()


@atexit.register
def _join_waiters() -> None:
    """A thread that comes back from torch while the interpreter ends would abort the process."""
    for waiter in list(_waiters):
        waiter.stop()
    for waiter in list(_waiters):
        waiter.join(EXIT_SECONDS)


def wait(transfer: Transfer, deadline: float) -> None:
    """Until a transfer has ended, which with NCCL the current stream waits for, too."""
    left = min(max(deadline - time.monotonic(), 1e-3), MAX_SECONDS)
    transfer.work.wait(timedelta(milliseconds=math.ceil(left * 1000)))
