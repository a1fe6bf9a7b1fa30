"""How a mesh ends: once, from any thread, signal handler or fork, whoever uses it at the moment."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from astra_runtime.core import _C
from astra_runtime.errors import AstraError

CLOSED: Final = "the mesh is closed"
FORKED: Final = (
    "this mesh belongs to the process that made it, and this one is a fork of it: connect here, "
    "or fork before"
)


def aborted_by(error: BaseException) -> str:
    """The reason of a mesh that this rank has aborted."""
    cause = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{CLOSED}: this rank has ended it by {cause}"


class Closeable(Protocol):
    def close(self) -> object: ...


class Lifetime:
    """Whether a mesh can be used, and when what it holds can be given back.

    Descriptors are closed when the mesh has ended and nobody uses it any more: one that a wait in
    another thread still polls could otherwise be somebody else's by then.

    Attributes:
        reason: why nothing can be done any more; None while the mesh is open.
        resources: closed at the end.
        keeper: the helper task that holds the address space (`Mesh.keeper`).
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.resources: list[Closeable] = []
        self.keeper: _C.Keeper | None = None
        self._users: list[None] = []  # appending and popping are atomic, unlike a counter
        self._finished = False
        self._wake: list[int] = []
        self._wake.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        _all.add(self)

    @property
    def wake(self) -> int:
        """A descriptor that is readable from the end on, for every wait to poll."""
        return self._wake[0]

    def check(self) -> None:
        if self.reason is not None:
            raise AstraError(self.reason)

    def __enter__(self) -> None:
        """A call begins. Raises AstraError after the end."""
        self._users.append(None)
        if self.reason is not None:
            self._leave()
            raise AstraError(self.reason)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """It ends; what went wrong because of the mesh's end is named so."""
        self._leave()
        if self.reason is not None and isinstance(error, AstraError | OSError):
            raise AstraError(self.reason) from error

    def _leave(self) -> None:
        self._users.pop()
        if self._finished and not self._users:
            self._release()

    def end(self, reason: str) -> bool:
        """No call begins from here on, and every wait wakes; False where that was so already."""
        if self.reason is not None:
            return False
        self.reason = reason
        os.eventfd_write(self.wake, 1)
        return True

    def finish(self) -> None:
        """Gives everything back, or has the last call that still runs do it."""
        self._finished = True
        if not self._users:
            self._release()

    def _release(self) -> None:
        while self.resources:
            with contextlib.suppress(IndexError):  # another thread was quicker
                self.resources.pop().close()
        with contextlib.suppress(IndexError):
            os.close(self._wake.pop())
        self.keeper = None

    def __del__(self) -> None:
        if self._wake:
            os.close(self._wake.pop())

    def after_fork(self) -> None:
        """In the child: nothing may be sent, and no descriptor may hide the parent's death."""
        if self.reason is None:
            self.reason = FORKED
        self._finished = True
        self._users.clear()
        self._release()


_all: weakref.WeakSet[Lifetime] = weakref.WeakSet()


def _after_fork() -> None:
    for lifetime in list(_all):
        lifetime.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class Interrupt:
    """Has a wait of the call that runs end early, from any thread or signal handler.

    Attributes:
        reason, call: why, and of which call; None: nobody has asked for it.
        fd: readable from then on.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.call = 0
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self, reason: str, call: int) -> None:
        self.call, self.reason = call, reason
        with contextlib.suppress(OSError, ValueError):  # closed: there is nobody to wake
            os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        if self.reason is not None:
            self.reason = None
            with contextlib.suppress(OSError, ValueError):
                os.eventfd_read(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class WriteTurn:
    """The right to write to the connections: one thread at a time.

    A signal handler that interrupts whoever has it must not write, in the middle of a frame
    perhaps, nor wait for itself: what it has to do is deferred to the end of the turn.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._deferred: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._owner = None
        self._lock.release()
        while self._deferred:
            self._deferred.pop()()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[bool]:
        """A turn, or False where nobody gave one in that time."""
        taken = self._lock.acquire(timeout=max(0.0, seconds))
        if taken:
            self._owner = threading.get_ident()
        try:
            yield taken
        finally:
            if taken:
                self.__exit__(None, None, None)

    def defer(self, action: Callable[[], None]) -> bool:
        """Has this thread's turn, which a signal handler has interrupted, end with `action`; False
        where this thread has none."""
        if self._owner != threading.get_ident():
            return False
        self._deferred.append(action)
        return True
