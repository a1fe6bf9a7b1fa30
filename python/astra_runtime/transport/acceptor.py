"""The accepting side of the bootstrap: callers are identified, then admitted or refused."""

from __future__ import annotations

import errno
import logging
import select
import socket
import ssl
from dataclasses import replace
from typing import Final

from astra_runtime import wire
from astra_runtime.errors import HandshakeRefused
from astra_runtime.transport.abort import printable
from astra_runtime.transport.credentials import named_rank
from astra_runtime.transport.pending import (
    HANDSHAKE_SECONDS,
    TLS_FIRST_BYTES,
    Members,
    PendingConnection,
    explain,
    is_from_tls,
    misnamed,
)
from astra_runtime.transport.sockets import prepare
from astra_runtime.wire import HELLO_SIZE, NOBODY, Hello

MAX_PENDING: Final = 256  # connections not yet admitted; when full, the oldest is dropped
LOGGED_REFUSALS: Final = 20  # a flood of callers must not become a flood of lines
KEPT_REFUSALS: Final = 8  # those that an error lists

log = logging.getLogger("astra_runtime.transport")


class Acceptor:
    """Takes in callers, and hands those that are ranks to `members`."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._own = members.own
        self._contexts = members.contexts
        self._pending: dict[int, PendingConnection] = {}  # by descriptor, oldest first
        self._from_ranks: list[str] = []  # refusals of callers who seemed to be ranks
        self._from_others: list[str] = []
        self.num_refused = 0
        self._quiet = False

    @property
    def refusals(self) -> list[str]:
        """Whom this rank has refused and why, those first who seemed to be ranks."""
        return [*self._from_ranks, *self._from_others][:KEPT_REFUSALS]

    def close(self) -> None:
        for caller in self._pending.values():
            caller.sock.close()

    def accept(self, listener: socket.socket) -> bool:
        """Takes in one caller; False when there was none."""
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._pending:
                oldest = next(iter(self._pending.values()))
                self._drop(oldest, "dropped: no descriptors are left")
            return error.errno == errno.ECONNABORTED  # that one has left already
        prepare(sock)
        if len(self._pending) >= MAX_PENDING:
            oldest = next(iter(self._pending.values()))
            self._drop(oldest, "dropped: too many connections without a HELLO")
        self._pending[sock.fileno()] = PendingConnection(sock, f"{address[0]}:{address[1]}")
        self._members.watch.register(sock, select.EPOLLIN)
        return True

    def serve(self, fd: int) -> bool:
        """Takes the caller at `fd` one step further; False where it is none of this side's."""
        caller = self._pending.get(fd)
        if caller is None:
            return False
        try:
            if caller.refused:
                # A close with unread input would reset the connection, the reason with it.
                if not caller.sock.recv(4096):
                    self._drop(caller)
            elif self._detect_tls(caller) and caller.stream.handshake():
                self._check_hello(caller, caller.read())
        except BlockingIOError:
            pass
        except ssl.SSLError as error:
            event = f"{caller.name}, which {explain(error)}"
            self._log_refusal(event, seems_rank=is_from_tls(error))
            self._linger(caller)  # an alert has told it
        except OSError as error:
            self._drop(caller, "" if caller.refused else error.strerror or str(error))
        return True

    def _detect_tls(self, caller: PendingConnection) -> bool:
        """Sees whether a caller speaks TLS, and refuses it where this does not fit."""
        if caller.identified:
            return True
        first = caller.peek()
        if not first:
            self._drop(caller, "left before its HELLO was complete")
            return False
        tls = first[0] in TLS_FIRST_BYTES
        if tls and self._contexts is not None:
            caller.encrypt(self._contexts.accepting, accepting=True)
        elif tls:
            self._refuse(caller, f"TLS came, and rank {self._own.rank} has no keys")
            return False
        elif self._contexts is not None:
            plaintext = f"plaintext came, and rank {self._own.rank} accepts TLS only"
            self._refuse(caller, wire.judge_prefix(first) or plaintext)
            return False
        caller.identified = True
        return True

    def _check_hello(self, caller: PendingConnection, complete: bool | None) -> None:
        """Judges as much of a HELLO as has been received."""
        reason = wire.judge_prefix(caller.data)
        if reason is not None:
            self._refuse(caller, reason)
            if caller.data[:4] == wire.MAGIC:
                raise HandshakeRefused(f"{caller.name} was refused: {reason}")
        elif complete is None:
            self._drop(caller, "left before its HELLO was complete")
        elif complete:
            self._admit(caller)

    def _admit(self, caller: PendingConnection) -> None:
        hello, reason_size = wire.decode_hello(caller.data[:HELLO_SIZE])
        if len(caller.data) < HELLO_SIZE + reason_size:
            caller.wanted = HELLO_SIZE + reason_size
            return
        if reason_size:
            why = printable(caller.data[HELLO_SIZE:])
            event = f"{caller.name}: rank {hello.rank} refused this rank: {why}"
            self._log_refusal(event, seems_rank=True)
            self._drop(caller)
            return
        named = named_rank(caller.stream.certificate())
        honest = named == hello.rank or not caller.stream.encrypted
        reason = self._reason_to_refuse(hello, None if honest else misnamed(named, hello.rank))
        if reason is not None:
            self._refuse(caller, reason, hello.rank)
            if honest and hello.world_size != self._own.world_size:
                raise HandshakeRefused(reason)  # such a world can never be complete
            return
        del self._pending[caller.fd]
        if self._reply(caller, replace(self._own, to=hello.rank)):
            self._members.join(hello.rank, caller.stream)

    def _reason_to_refuse(self, hello: Hello, reason: str | None) -> str | None:
        """`reason`, or what else speaks against the rank that sent `hello`."""
        reason = reason or wire.refusal(self._own, hello)
        if reason is None and hello.rank < self._own.rank:
            reason = f"rank {self._own.rank} dials rank {hello.rank}, not the other way round"
        if reason is None and hello.rank in self._members.joined:
            reason = f"rank {hello.rank} has joined already: two processes claim it"
        return reason

    def _reply(self, caller: PendingConnection, hello: Hello, reason: str = "") -> bool:
        try:
            self._members.stats.bytes_sent_total += caller.write(hello.encode(reason))
        except OSError:
            self._members.drop(caller.sock)
            return False
        return True

    def _refuse(self, caller: PendingConnection, reason: str, to: int = NOBODY) -> None:
        proven = caller.stream.encrypted
        event, seems_rank = f"{caller.name}: {reason}", proven or to != NOBODY
        self._log_refusal(event, seems_rank=seems_rank, proven=proven)
        # Somebody without a certificate learns the reason, and nothing of this run.
        known = self._contexts is None or caller.stream.encrypted
        hello = replace(self._own, to=to) if known else Hello(0, NOBODY, NOBODY)
        if not self._reply(caller, hello, reason):
            self._pending.pop(caller.fd, None)
            return
        self._linger(caller)

    def _linger(self, caller: PendingConnection) -> None:
        """Waits for the other side to leave, so that it can read why it was refused."""
        caller.refused = True
        try:
            caller.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(caller)

    def _log_refusal(self, event: str, *, seems_rank: bool = False, proven: bool = False) -> None:
        """`seems_rank`: the caller spoke as a rank does; `proven`: it has keys of this run."""
        self.num_refused += 1
        quiet = self.num_refused > LOGGED_REFUSALS and not proven
        level = logging.DEBUG if quiet else logging.WARNING
        log.log(level, "rank %d refused %s", self._own.rank, event)
        if quiet and not self._quiet:
            self._quiet = True
            log.warning("rank %d refuses further callers without a line each", self._own.rank)
        events = self._from_ranks if seems_rank else self._from_others
        if len(events) < KEPT_REFUSALS:
            events.append(event)

    def _drop(self, caller: PendingConnection, why: str = "") -> None:
        if why:
            self._log_refusal(f"{caller.name}: {why}")
        del self._pending[caller.fd]
        self._members.drop(caller.sock)

    def expire(self, now: float) -> None:
        """Drops callers whose time is up."""
        for caller in list(self._pending.values()):
            if now <= caller.deadline:
                break  # the oldest come first
            silent = f"sent no HELLO within {HANDSHAKE_SECONDS:g} s"
            self._drop(caller, "" if caller.refused else silent)
