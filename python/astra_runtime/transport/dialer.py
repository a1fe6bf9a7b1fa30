"""The dialing side of the bootstrap: the way to each lower rank, tried again until it stands."""

from __future__ import annotations

import errno
import select
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from astra_runtime import wire
from astra_runtime.errors import HandshakeRefused, WireError
from astra_runtime.transport.abort import printable
from astra_runtime.transport.addresses import Endpoint, resolve
from astra_runtime.transport.credentials import is_bound_to, named_rank
from astra_runtime.transport.pending import (
    HANDSHAKE_SECONDS,
    TLS_FIRST_BYTES,
    Members,
    PendingConnection,
    explain,
    misnamed,
)
from astra_runtime.transport.sockets import prepare
from astra_runtime.transport.stream import Stream
from astra_runtime.wire import HELLO_SIZE, SAME_TRANSPORT

RETRY_SECONDS: Final = 0.05
# What the store of torch.distributed does to a dialer, too.
NO_ANSWER: Final = f"it closed the connection without an answer; if it runs, {SAME_TRANSPORT}"
SILENT: Final = f"no answer within {HANDSHAKE_SECONDS:g} s; if it runs, {SAME_TRANSPORT}"


class _Dial:
    """The way to one lower rank."""

    def __init__(self, rank: int, address: tuple[str, int]) -> None:
        self.rank = rank
        self.address = address
        self.name = f"{address[0]}:{address[1]}"
        self.endpoints: list[Endpoint] = []  # not tried yet in this round
        self.next_try = 0.0
        self.pending: PendingConnection | None = None
        self.connected = False
        self.trouble = "it was not tried"

    def refused(self, reason: str) -> HandshakeRefused:
        return HandshakeRefused(f"rank {self.rank} at {self.name} {reason}")


class Dialer:
    """Dials the ranks of `addresses`, and hands those that answer to `members`."""

    def __init__(self, members: Members, addresses: Mapping[int, tuple[str, int]]) -> None:
        self._members = members
        self._own = members.own
        self._contexts = members.contexts
        self._dials = {rank: _Dial(rank, address) for rank, address in addresses.items()}
        self._by_fd: dict[int, _Dial] = {}

    def close(self) -> None:
        for dial in self._dials.values():
            if dial.pending is not None:
                dial.pending.sock.close()

    def trouble(self, rank: int) -> str | None:
        """What kept a rank that this one dials from joining."""
        dial = self._dials.get(rank)
        if dial is None:
            return None
        return f"rank {rank} did not answer at {dial.name} ({dial.trouble})"

    def redial(self, now: float) -> None:
        for dial in self._dials.values():
            joined = dial.rank in self._members.joined
            if dial.pending is None and not joined and now >= dial.next_try:
                self._dial(dial)

    def expire(self, now: float) -> None:
        for dial in self._dials.values():
            if dial.pending is not None and now > dial.pending.deadline:
                self._retry_later(dial, SILENT)

    def _dial(self, dial: _Dial) -> None:
        try:
            dial.endpoints = dial.endpoints or resolve(*dial.address)
            endpoint = dial.endpoints.pop(0)
            sock = socket.socket(endpoint.family, endpoint.kind, endpoint.protocol)
        except (OSError, UnicodeError) as error:
            self._retry_later(dial, getattr(error, "strerror", None) or str(error))
            return
        prepare(sock)
        dial.pending = PendingConnection(sock, dial.name)
        dial.connected = False
        self._by_fd[sock.fileno()] = dial
        code = sock.connect_ex(endpoint.address)
        if code not in (0, errno.EINPROGRESS):
            self._retry_later(dial, errno.errorcode.get(code, str(code)))
            return
        # not before: an unconnected socket "hung up"
        self._members.watch.register(sock, select.EPOLLOUT)

    def _retry_later(self, dial: _Dial, trouble: str) -> None:
        if dial.pending is not None:
            del self._by_fd[dial.pending.fd]
            self._members.drop(dial.pending.sock)
            dial.pending = None
        dial.trouble = trouble
        # every address of a name is tried before there is a pause
        dial.next_try = time.monotonic() + (0.0 if dial.endpoints else RETRY_SECONDS)

    def serve(self, fd: int) -> bool:
        """Takes the dial at `fd` one step further: connected, TLS, HELLO sent, reply read, joined.
        False where `fd` is none of this side's."""
        dial = self._by_fd.get(fd)
        if dial is None or dial.pending is None:
            return False
        try:
            self._advance(dial, dial.pending)
        except BlockingIOError:
            pass
        except ssl.SSLError as error:
            raise dial.refused(explain(error)) from error
        except OSError as error:
            self._retry_later(dial, error.strerror or str(error))
        return True

    def _advance(self, dial: _Dial, pending: PendingConnection) -> None:
        if not dial.connected:
            self._after_connect(dial, pending)
            return
        if not pending.identified and not self._detect_tls(dial, pending):
            return
        if not pending.stream.handshake():
            return
        if pending.stream.encrypted and not pending.hello_sent:
            self._send_hello(dial, pending)
        complete = pending.read()
        if pending.data[:4] != wire.MAGIC[: len(pending.data)]:
            raise HandshakeRefused(
                f"{dial.name}, given as rank {dial.rank}, does not speak ASTRA; "
                f"if it is a rank, {SAME_TRANSPORT}"
            )
        if complete is None:
            self._retry_later(dial, NO_ANSWER)
        elif complete:
            self._conclude(dial, pending)

    def _after_connect(self, dial: _Dial, pending: PendingConnection) -> None:
        code = pending.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, errno.errorcode.get(code, str(code)))
        # A port of the ephemeral range that nobody listens at can meet its own dial.
        if pending.sock.getsockname() == pending.sock.getpeername():
            raise OSError(errno.ECONNREFUSED, "ECONNREFUSED")
        dial.connected = True
        self._members.watch.modify(pending.fd, select.EPOLLIN)
        if self._contexts is None:
            hello = replace(self._own, to=dial.rank)
            self._members.stats.bytes_sent_total += pending.write(hello.encode())
        else:
            pending.encrypt(self._contexts.dialing, accepting=False).begin()

    def _detect_tls(self, dial: _Dial, pending: PendingConnection) -> bool:
        """Looks at the first byte of an answer: a refusal may come in plaintext."""
        first = pending.peek()
        if not first:
            self._retry_later(dial, NO_ANSWER)
            return False
        pending.identified = True
        tls = first[0] in TLS_FIRST_BYTES
        if tls and self._contexts is None:
            raise dial.refused(f"speaks TLS, and rank {self._own.rank} has no keys")
        if not tls:
            pending.stream = Stream(pending.sock)
        return True

    def _send_hello(self, dial: _Dial, pending: PendingConnection) -> None:
        """Checks whom the certificate names; sends HELLO, or what is wrong."""
        pending.hello_sent = True
        certificate = pending.stream.certificate()
        named, reason = named_rank(certificate), ""
        if named != dial.rank:
            reason = misnamed(named, dial.rank)
        elif not is_bound_to(certificate, dial.address[0]):
            reason = f"the certificate of rank {named} is not for the address {dial.address[0]}"
        hello = replace(self._own, to=dial.rank)
        self._members.stats.bytes_sent_total += pending.write(hello.encode(reason))
        if reason:
            raise dial.refused(f"was refused: {reason}")

    def _conclude(self, dial: _Dial, pending: PendingConnection) -> None:
        """Judges the reply; a refusal's reason has to be read first."""
        try:
            other, reason_size = wire.decode_hello(pending.data[:HELLO_SIZE])
        except WireError as error:
            raise HandshakeRefused(f"rank {dial.rank} at {dial.name}: {error}") from error
        if len(pending.data) < HELLO_SIZE + reason_size:
            pending.wanted = HELLO_SIZE + reason_size
            return
        reason: str | None = printable(pending.data[HELLO_SIZE:])
        if not reason and self._contexts is not None and not pending.stream.encrypted:
            reason = f"it answered in plaintext, and rank {self._own.rank} has keys"
        reason = reason or wire.refusal(self._own, other)
        if not reason and other.rank != dial.rank:
            reason = f"rank {other.rank} answered"
        if reason:
            raise dial.refused(f"refused: {reason}")
        del self._by_fd[pending.fd]
        dial.pending = None
        self._members.join(dial.rank, pending.stream)
