"""Bootstrapping the mesh: a rank listens at its address, dials lower ranks, admits higher ones.

One loop serves the listener, the dials and the pending connections, a step at a time, so that
nobody who is silent or talks nonsense can hold up a good peer. With keys a connection is TLS 1.3,
and a peer counts when its certificate names the rank that its HELLO claims. Before that it costs a
place among `MAX_PENDING`, 16 KiB to be read and 5 seconds at most.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from astra_runtime.errors import ConnectFailed, PeersRefused, anew
from astra_runtime.transport.abort import error_at_end
from astra_runtime.transport.acceptor import KEPT_REFUSALS, Acceptor
from astra_runtime.transport.credentials import Contexts
from astra_runtime.transport.dialer import RETRY_SECONDS, Dialer
from astra_runtime.transport.options import OnWait
from astra_runtime.transport.pending import Members
from astra_runtime.transport.stats import Stats
from astra_runtime.transport.stream import Stream
from astra_runtime.wire import Hello

ACCEPTED_AT_ONCE: Final = 16  # before pending connections are served again
NOTICE_SECONDS: Final = 1.0  # between two calls of `on_wait`


class MeshBootstrap:
    """One rank's way into the mesh; `run` returns a connection to every peer.

    contexts: this rank's keys, made ready; None: plaintext. hint: what may be the reason if a rank
    is missing in the end.
    """

    def __init__(
        self,
        own: Hello,
        listeners: Sequence[socket.socket],
        addresses: Mapping[int, tuple[str, int]],
        contexts: Contexts | None = None,
        hint: str = "",
    ) -> None:
        self._own = own  # addressed to nobody yet
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._hint = hint
        self._members = Members(own, contexts)
        self._acceptor = Acceptor(self._members)
        self._dialer = Dialer(self._members, {rank: addresses[rank] for rank in range(own.rank)})

    @property
    def stats(self) -> Stats:
        """What the handshakes have cost, of the peers that joined."""
        return self._members.stats

    def run(
        self,
        seconds: float,
        on_wait: OnWait | None = None,
        check: Callable[[], None] | None = None,
    ) -> dict[int, Stream]:
        """Waits for every rank, `seconds` at most; `on_wait`, `check`: see `ConnectOptions`."""
        begun = time.monotonic()
        deadline, notice = begun + seconds, begun + NOTICE_SECONDS
        members = self._members
        try:
            for listener in self._listeners:
                members.watch.register(listener, select.EPOLLIN)
            while len(members.joined) < self._own.world_size - 1:
                now = time.monotonic()
                if now >= deadline:
                    raise self._missing(seconds)
                self._dialer.redial(now)
                self._acceptor.expire(now)
                self._dialer.expire(now)
                self._serve(min(deadline - now, RETRY_SECONDS))
                if check is not None:
                    check()
                if on_wait is not None and now >= notice:
                    notice = now + NOTICE_SECONDS
                    on_wait(self._absent())
        except BaseException:
            for stream in members.joined.values():
                stream.close()
            raise
        finally:
            members.watch.close()
            self._acceptor.close()
            self._dialer.close()
        return members.joined

    def _serve(self, seconds: float) -> None:
        """One step of everything that can take one; new callers last."""
        called = []
        for fd, _ in self._members.watch.poll(seconds):
            if self._acceptor.serve(fd) or self._dialer.serve(fd):
                continue
            rank = self._members.rank_of.get(fd)
            if rank is not None:
                stream = self._members.joined[rank]
                cause = error_at_end(stream, rank, None, "it closed the connection")
                if cause is not None:
                    raise anew(cause)
                self._members.watch.unregister(fd)  # what it sent before its BYE can still be read
            elif fd in self._listeners:
                called.append(self._listeners[fd])
        for listener in called:
            for _ in range(ACCEPTED_AT_ONCE):
                if not self._acceptor.accept(listener):
                    break

    def _absent(self) -> tuple[int, ...]:
        present = {self._own.rank, *self._members.joined}
        return tuple(rank for rank in range(self._own.world_size) if rank not in present)

    def _missing(self, seconds: float) -> ConnectFailed:
        missing = self._absent()
        details = [self._dialer.trouble(rank) or f"rank {rank} did not call" for rank in missing]
        text = f"within {seconds:g} s " + ", ".join(details)
        text += f"; {self._hint}" if self._hint else ""
        refusals = self._acceptor.refusals
        if not refusals:
            return ConnectFailed(text, missing)
        more = self._acceptor.num_refused - len(refusals)
        text += "; refused meanwhile: " + "; ".join(refusals[:KEPT_REFUSALS])
        return PeersRefused(text + (f"; {more} more" if more else ""), missing)
