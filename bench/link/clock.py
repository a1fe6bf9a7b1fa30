"""A rank's virtual clock, and what sockets would cost it."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

import numpy as np


class Lap(NamedTuple):
    """One rank since the last start, in virtual seconds: finish = computing + waiting."""

    finish: float
    computing: float
    waiting: float


class Span(NamedTuple):
    """What a rank did from `start` to `stop`, in virtual seconds."""

    rank: int
    stage: str
    start: float
    stop: float


class SocketCosts(NamedTuple):
    """CPU seconds that a frame costs its sender and its receiver, and each of its bytes."""

    send: float = 0.0
    send_byte: float = 0.0
    receive: float = 0.0
    receive_byte: float = 0.0

    @classmethod
    def measured(cls, repeats: int = 200) -> SocketCosts:
        """Of TCP over loopback on this machine, whose sender also pays for the kernel's receiving
        side: too much rather than too little."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            out = socket.create_connection(server.getsockname())
            into, _ = server.accept()
        with out, into:
            for end in (out, into):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            small, large = (_socket_times(out, into, size, repeats) for size in (64, 16384))
        slopes = [max(0.0, (b - a) / (16384 - 64)) for a, b in zip(small, large, strict=True)]
        return cls(small[0], slopes[0], small[1], slopes[1])


def _socket_times(
    out: socket.socket, into: socket.socket, size: int, repeats: int
) -> tuple[float, float]:
    data, taken = bytearray(size), np.empty((repeats, 2))
    for i in range(repeats):
        start = time.thread_time()
        out.sendall(data)
        middle = time.thread_time()
        into.recv_into(data, size, socket.MSG_WAITALL)
        taken[i] = middle - start, time.thread_time() - middle
    sent, received = np.median(taken, 0).tolist()
    return sent, received


class State(Enum):
    READY = auto()
    RECEIVING = auto()
    STARTING = auto()
    ENDED = auto()


@dataclass(eq=False)
class Rank:
    """A rank's clock and what it waits for. Whoever holds the baton may touch all of them."""

    index: int
    measure: Callable[[], float]
    speed: float
    keep_spans: bool
    state: State = State.READY
    clock: float = 0.0
    computing: float = 0.0
    waiting: float = 0.0
    running: bool = False
    mark: float = 0.0  # what `measure` said when the clock was set
    stages: list[str] = field(default_factory=lambda: ["compute"])
    spans: list[Span] = field(default_factory=list)
    sources: tuple[int, ...] = ()
    deadline: float = math.inf
    wake: float = 0.0
    gone: float | None = None  # when its peers can no longer expect anything of it
    reason: str = ""
    baton: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, seconds: float, stage: str) -> None:
        """Computes for `seconds` of virtual time."""
        self._span(stage, self.clock + seconds)
        self.clock += seconds
        self.computing += seconds

    def wait_until(self, moment: float, stage: str = "wait") -> None:
        if moment > self.clock:
            self._span(stage, moment)
            self.waiting += moment - self.clock
            self.clock = moment

    def _span(self, stage: str, stop: float) -> None:
        if not self.keep_spans or stop <= self.clock:
            return
        last = self.spans[-1] if self.spans else None
        if last is not None and last.stage == stage and last.stop == self.clock:
            self.spans[-1] = last._replace(stop=stop)
        else:
            self.spans.append(Span(self.index, stage, self.clock, stop))

    def read(self) -> None:
        """Brings the clock up to date with what was executed."""
        if self.running:
            now = self.measure()
            self.advance((now - self.mark) / self.speed, self.stages[-1])
            self.mark = now

    @contextlib.contextmanager
    def off_clock(self) -> Iterator[None]:
        """What happens inside is not executed by the rank: it costs only what it says it does."""
        self.read()
        self.running = False
        try:
            yield
        finally:
            self.running = True
            self.mark = self.measure()

    def lap(self) -> Lap:
        return Lap(self.clock, self.computing, self.waiting)
