"""Joining the mesh: rank i listens at its address, dials every lower rank, admits every higher one.

One loop serves the listener, the dials and the strangers at the door, a step at a time, so that
nobody who is silent or talks nonsense can hold up a good peer. With keys a connection is TLS 1.3,
and a peer counts when its certificate names the rank that its HELLO claims. Before that it costs a
place among `MAX_STRANGERS`, 16 KiB to be read and 5 seconds at most.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from astra_runtime import wire
from astra_runtime.errors import ConnectFailed, HandshakeRefused, PeersRefused, WireError
from astra_runtime.transport.abort import ending, printable
from astra_runtime.transport.certificates import Contexts, is_bound_to, named_rank
from astra_runtime.transport.mesh import Stats
from astra_runtime.transport.pending import (
    ENDED,
    HANDSHAKE_SECONDS,
    TLS_FIRST_BYTES,
    Door,
    explain,
    is_spoken,
)
from astra_runtime.transport.sockets import prepare
from astra_runtime.transport.stream import Stream, TlsStream
from astra_runtime.wire import HELLO_SIZE, NOBODY, Hello

MAX_STRANGERS: Final = 256  # connections not yet admitted; when full, the oldest is dropped
ACCEPTED_AT_ONCE: Final = 16  # before those at the door are heard again
RETRY_SECONDS: Final = 0.05
LOGGED: Final = 20  # refusals; a flood of strangers must not become a flood of lines
KEPT: Final = 8  # refusals that an error tells
_REFUSED: Final = "rank %d refused %s"

log = logging.getLogger("astra_runtime.transport")


class _Dial:
    """The way to one lower rank, tried again until the deadline."""

    def __init__(self, rank: int, address: tuple[str, int]) -> None:
        self.rank = rank
        self.address = address
        self.name = f"{address[0]}:{address[1]}"
        self.next_try = 0.0
        self.door: Door | None = None
        self.connected = False
        self.trouble = "it was not tried"

    def refused(self, reason: str) -> HandshakeRefused:
        return HandshakeRefused(f"rank {self.rank} at {self.name} {reason}")


class Formation:
    """One rank's way into the mesh; `run` returns a connection to every peer.

    contexts: this rank's keys, made ready; None: plaintext.
    """

    def __init__(
        self,
        own: Hello,
        listener: socket.socket,
        addresses: Mapping[int, tuple[str, int]],
        contexts: Contexts | None = None,
    ) -> None:
        self.own = own  # addressed to nobody yet
        self.listener = listener
        self.contexts = contexts
        self.dials = {rank: _Dial(rank, addresses[rank]) for rank in range(own.rank)}
        self.joined: dict[int, Stream] = {}
        self.stats = Stats()
        self._doors: dict[int, Door] = {}  # accepted, not admitted; by descriptor, oldest first
        self._dialing: dict[int, _Dial] = {}
        self._ranks: dict[int, int] = {}  # of those who joined
        self._refusals: list[str] = []  # of callers who seemed to be ranks
        self._noise: list[str] = []
        self._noted = 0
        self._quiet = False
        self._watch = select.epoll()

    def run(self, seconds: float) -> dict[int, Stream]:
        deadline = time.monotonic() + seconds
        try:
            self._watch.register(self.listener, select.EPOLLIN)
            while len(self.joined) < self.own.world_size - 1:
                now = time.monotonic()
                if now >= deadline:
                    raise self._missing(seconds)
                self._redial(now)
                self._expire(now)
                self._serve(min(deadline - now, RETRY_SECONDS))
        except BaseException:
            for stream in self.joined.values():
                stream.close()
            raise
        finally:
            self._watch.close()
            for door in [*self._doors.values(), *(d.door for d in self.dials.values() if d.door)]:
                door.sock.close()
        return self.joined

    def _serve(self, seconds: float) -> None:
        """One step of everything that can take one; new callers last."""
        callers = False
        for fd, _ in self._watch.poll(seconds):
            if fd in self._doors:
                self._question(self._doors[fd])
            elif fd in self._dialing:
                self._pursue(self._dialing[fd])
            elif fd in self._ranks:
                rank = self._ranks[fd]
                cause = ending(self.joined[rank], rank, None, "it closed the connection")
                if cause is not None:
                    raise cause
                self._watch.unregister(fd)  # what it sent before its BYE can still be read
            else:
                callers = callers or fd == self.listener.fileno()
        if callers:
            for _ in range(ACCEPTED_AT_ONCE):
                if not self._accept():
                    break

    def _join(self, rank: int, stream: Stream) -> None:
        self.joined[rank] = stream
        self.stats.bytes_received_total += stream.received
        self.stats.bytes_sent_total += stream.handshake_sent
        if isinstance(stream, TlsStream):
            stream.trust()
        fd = stream.sock.fileno()
        self._ranks[fd] = rank
        self._watch.modify(fd, ENDED)

    # --- the acceptor's side

    def _accept(self) -> bool:
        """Takes in one caller; False when there was none."""
        try:
            sock, address = self.listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._doors:
                self._drop(next(iter(self._doors.values())), "dropped: no descriptors are left")
            return error.errno == errno.ECONNABORTED  # that one has left already
        prepare(sock)
        if len(self._doors) >= MAX_STRANGERS:
            oldest = next(iter(self._doors.values()))
            self._drop(oldest, "dropped: too many connections without a HELLO")
        self._doors[sock.fileno()] = Door(sock, f"{address[0]}:{address[1]}")
        self._watch.register(sock, select.EPOLLIN)
        return True

    def _question(self, door: Door) -> None:
        """Hears what a stranger says; admits it, refuses it, or waits for more."""
        try:
            if door.refused:
                # A close with unread input would reset the connection, the reason with it.
                if not door.sock.recv(4096):
                    self._drop(door)
            elif self._identify(door) and door.stream.handshake():
                self._hear(door, door.read())
        except BlockingIOError:
            return
        except ssl.SSLError as error:
            self._note(f"{door.name}, which {explain(error)}", spoken=is_spoken(error))
            self._send_off(door)  # an alert has told it
        except OSError as error:
            self._drop(door, "" if door.refused else error.strerror or str(error))

    def _identify(self, door: Door) -> bool:
        """Sees whether a caller speaks TLS, and refuses it where this does not fit."""
        if door.identified:
            return True
        first = door.peek()
        if not first:
            self._drop(door, "left before its HELLO was complete")
            return False
        tls = first[0] in TLS_FIRST_BYTES
        if tls and self.contexts is not None:
            door.encrypt(self.contexts.accepting, accepting=True)
        elif tls:
            self._refuse(door, f"TLS came, and rank {self.own.rank} has no keys")
            return False
        elif self.contexts is not None:
            plaintext = f"plaintext came, and rank {self.own.rank} accepts TLS only"
            self._refuse(door, wire.judge_prefix(first) or plaintext)
            return False
        door.identified = True
        return True

    def _hear(self, door: Door, complete: bool | None) -> None:
        """Judges the part of a HELLO that has come."""
        reason = wire.judge_prefix(door.data)
        if reason is not None:
            self._refuse(door, reason)
            if door.data[:4] == wire.MAGIC:
                raise HandshakeRefused(f"{door.name} was refused: {reason}")
        elif complete is None:
            self._drop(door, "left before its HELLO was complete")
        elif complete:
            self._admit(door)

    def _admit(self, door: Door) -> None:
        hello, reason_size = wire.decode_hello(door.data[:HELLO_SIZE])
        if len(door.data) < HELLO_SIZE + reason_size:
            door.wanted = HELLO_SIZE + reason_size
            return
        if reason_size:
            why = printable(door.data[HELLO_SIZE:])
            self._note(f"{door.name}: rank {hello.rank} refused this rank: {why}", spoken=True)
            self._drop(door)
            return
        named = named_rank(door.stream.certificate())
        honest = named == hello.rank or not door.stream.encrypted
        reason = None if honest else _misnamed(named, hello.rank)
        reason = reason or wire.refusal(self.own, hello)
        if reason is None and hello.rank < self.own.rank:
            reason = f"rank {self.own.rank} dials rank {hello.rank}, not the other way round"
        if reason is None and hello.rank in self.joined:
            reason = f"rank {hello.rank} has joined already: two processes claim it"
        if reason is not None:
            self._refuse(door, reason, hello.rank)
            if honest and hello.world_size != self.own.world_size:
                raise HandshakeRefused(reason)  # such a world can never be complete
            return
        del self._doors[door.fd]
        if self._reply(door, replace(self.own, to=hello.rank)):
            self._join(hello.rank, door.stream)

    def _reply(self, door: Door, hello: Hello, reason: str = "") -> bool:
        try:
            self.stats.bytes_sent_total += door.write(hello.encode(reason))
        except OSError:
            door.sock.close()
            return False
        return True

    def _refuse(self, door: Door, reason: str, to: int = NOBODY) -> None:
        proven = door.stream.encrypted
        self._note(f"{door.name}: {reason}", spoken=proven or to != NOBODY, proven=proven)
        # Somebody without a certificate learns the reason, and nothing of this run.
        known = self.contexts is None or door.stream.encrypted
        hello = replace(self.own, to=to) if known else Hello(0, NOBODY, NOBODY)
        if not self._reply(door, hello, reason):
            self._doors.pop(door.fd, None)
            return
        self._send_off(door)

    def _send_off(self, door: Door) -> None:
        """Waits for the other side to leave, so that it can read why it was refused."""
        door.refused = True
        try:
            door.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(door)

    def _note(self, event: str, *, spoken: bool = False, proven: bool = False) -> None:
        """`spoken`: by somebody who seemed to be a rank; `proven`: who has keys of this run."""
        self._noted += 1
        quiet = self._noted > LOGGED and not proven
        log.log(logging.DEBUG if quiet else logging.WARNING, _REFUSED, self.own.rank, event)
        if quiet and not self._quiet:
            self._quiet = True
            log.warning("rank %d refuses further strangers without a line each", self.own.rank)
        kept = self._refusals if spoken else self._noise
        if len(kept) < KEPT:
            kept.append(event)

    def _drop(self, door: Door, why: str = "") -> None:
        if why:
            self._note(f"{door.name}: {why}")
        del self._doors[door.fd]
        door.sock.close()

    def _expire(self, now: float) -> None:
        for door in list(self._doors.values()):
            if now <= door.deadline:
                break  # the oldest come first
            silent = f"sent no HELLO within {HANDSHAKE_SECONDS:g} s"
            self._drop(door, "" if door.refused else silent)
        for dial in self.dials.values():
            if dial.door is not None and now > dial.door.deadline:
                self._again(dial, f"no answer within {HANDSHAKE_SECONDS:g} s")

    # --- the dialer's side

    def _redial(self, now: float) -> None:
        for dial in self.dials.values():
            if dial.door is None and dial.rank not in self.joined and now >= dial.next_try:
                self._dial(dial)

    def _dial(self, dial: _Dial) -> None:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                *dial.address, type=socket.SOCK_STREAM
            )[0]
            sock = socket.socket(family, kind, protocol)
        except OSError as error:
            self._again(dial, error.strerror or str(error))
            return
        prepare(sock)
        dial.door = Door(sock, dial.name)
        dial.connected = False
        self._dialing[sock.fileno()] = dial
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            self._again(dial, errno.errorcode.get(code, str(code)))
            return
        self._watch.register(sock, select.EPOLLOUT)  # not before: an unconnected socket "hung up"

    def _again(self, dial: _Dial, trouble: str) -> None:
        if dial.door is not None:
            del self._dialing[dial.door.fd]
            dial.door.sock.close()
            dial.door = None
        dial.trouble = trouble
        dial.next_try = time.monotonic() + RETRY_SECONDS

    def _pursue(self, dial: _Dial) -> None:
        """Takes a dial one step further: connected, TLS, HELLO sent, reply read, joined."""
        door = dial.door
        assert door is not None
        try:
            if not dial.connected:
                self._connected(dial, door)
                return
            if not door.identified and not self._recognize(dial, door):
                return
            if not door.stream.handshake():
                return
            if door.stream.encrypted and not door.greeted:
                self._greet(dial, door)
            complete = door.read()
        except BlockingIOError:
            return
        except ssl.SSLError as error:
            raise dial.refused(explain(error)) from error
        except OSError as error:
            self._again(dial, error.strerror or str(error))
            return
        if door.data[:4] != wire.MAGIC[: len(door.data)]:
            raise HandshakeRefused(f"{dial.name}, given as rank {dial.rank}, does not speak ASTRA")
        if complete is None:
            self._again(dial, "it closed the connection without an answer")
        elif complete:
            self._conclude(dial, door)

    def _connected(self, dial: _Dial, door: Door) -> None:
        code = door.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, errno.errorcode.get(code, str(code)))
        # A port of the ephemeral range that nobody listens at can meet its own dial.
        if door.sock.getsockname() == door.sock.getpeername():
            raise OSError(errno.ECONNREFUSED, "ECONNREFUSED")
        dial.connected = True
        self._watch.modify(door.fd, select.EPOLLIN)
        if self.contexts is None:
            self.stats.bytes_sent_total += door.write(replace(self.own, to=dial.rank).encode())
        else:
            door.encrypt(self.contexts.dialing, accepting=False).begin()

    def _recognize(self, dial: _Dial, door: Door) -> bool:
        """Looks at the first byte of an answer: a refusal may come in plaintext."""
        first = door.peek()
        if not first:
            self._again(dial, "it closed the connection without an answer")
            return False
        door.identified = True
        tls = first[0] in TLS_FIRST_BYTES
        if tls and self.contexts is None:
            raise dial.refused(f"speaks TLS, and rank {self.own.rank} has no keys")
        if not tls:
            door.stream = Stream(door.sock)
        return True

    def _greet(self, dial: _Dial, door: Door) -> None:
        """Checks whom the certificate names; says HELLO, or what is wrong."""
        door.greeted = True
        certificate = door.stream.certificate()
        named, reason = named_rank(certificate), ""
        if named != dial.rank:
            reason = _misnamed(named, dial.rank)
        elif not is_bound_to(certificate, dial.address[0]):
            reason = f"the certificate of rank {named} is not for the address {dial.address[0]}"
        hello = replace(self.own, to=dial.rank)
        self.stats.bytes_sent_total += door.write(hello.encode(reason))
        if reason:
            raise dial.refused(f"was refused: {reason}")

    def _conclude(self, dial: _Dial, door: Door) -> None:
        """Judges the reply; a refusal's reason has to be read first."""
        try:
            other, reason_size = wire.decode_hello(door.data[:HELLO_SIZE])
        except WireError as error:
            raise HandshakeRefused(f"rank {dial.rank} at {dial.name}: {error}") from error
        if len(door.data) < HELLO_SIZE + reason_size:
            door.wanted = HELLO_SIZE + reason_size
            return
        reason: str | None = printable(door.data[HELLO_SIZE:])
        if not reason and self.contexts is not None and not door.stream.encrypted:
            reason = f"it answered in plaintext, and rank {self.own.rank} has keys"
        reason = reason or wire.refusal(self.own, other)
        if not reason and other.rank != dial.rank:
            reason = f"rank {other.rank} answered"
        if reason:
            raise dial.refused(f"refused: {reason}")
        del self._dialing[door.fd]
        dial.door = None
        self._join(dial.rank, door.stream)

    def _missing(self, seconds: float) -> ConnectFailed:
        missing = tuple(r for r in range(self.own.world_size) if r not in self._present())
        details = [
            f"rank {rank} "
            + (
                f"did not answer at {self.dials[rank].name} ({self.dials[rank].trouble})"
                if rank in self.dials
                else "did not call"
            )
            for rank in missing
        ]
        text = f"within {seconds:g} s " + ", ".join(details)
        refusals = [*self._refusals, *self._noise][:KEPT]
        if not refusals:
            return ConnectFailed(text, missing)
        more = self._noted - len(refusals)
        text += "; refused meanwhile: " + "; ".join(refusals) + (f"; {more} more" if more else "")
        return PeersRefused(text, missing)

    def _present(self) -> set[int]:
        return {self.own.rank, *self.joined}


def _misnamed(named: int | None, claimed: int) -> str:
    whose = "a certificate of no rank" if named is None else f"the certificate of rank {named}"
    return f"{whose} was shown for rank {claimed}"
