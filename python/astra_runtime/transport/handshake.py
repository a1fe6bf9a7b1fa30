"""Joining the mesh: rank i listens at its address, dials every lower rank, admits every higher one.

One loop serves the listener, the dials and the strangers at the door, so that nobody who is silent
can hold up a good peer. Before its HELLO is checked a connection may cost 30 bytes and 5 seconds.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from astra_runtime import wire
from astra_runtime.errors import ConnectFailed, HandshakeRefused, PeerLost, WireError
from astra_runtime.transport.mesh import Stats
from astra_runtime.transport.tcp import ended_properly, prepare
from astra_runtime.wire import HELLO_SIZE, Hello

HANDSHAKE_SECONDS: Final = 5.0  # for one connection, from accept or dial to the checked HELLO
MAX_STRANGERS: Final = 64  # connections not yet admitted; when full, the oldest is dropped
RETRY_SECONDS: Final = 0.05
_ENDED: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR

log = logging.getLogger("astra_runtime.transport")


def parse_address(text: str) -> tuple[str, int]:
    """`host:port` (IPv6 in brackets) as a pair; raises ValueError with what was expected."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise ValueError(f'address: expected "host:port", got {text!r}')
    return host.strip("[]"), int(port)


def listen(host: str, port: int, rank: int) -> socket.socket:
    """A listening socket at exactly this address (port 0: any free one)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConnectFailed(f"rank {rank} cannot resolve {host!r}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        prepare(listener)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"rank {rank} cannot listen: port {port} of {host} is in use"
        else:
            reason = f"rank {rank} cannot listen at {host}:{port}: {error.strerror}"
        raise ConnectFailed(reason) from error
    return listener


class _Door:
    """A connection before it counts: bytes read so far, and when its time is up."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.name = name
        self.deadline = time.monotonic() + HANDSHAKE_SECONDS
        self.data = bytearray()
        self.wanted = HELLO_SIZE
        self.refused = False

    def read(self) -> bool | None:
        """Reads towards `wanted` bytes and never past them; None at the end of the stream."""
        try:
            data = self.sock.recv(self.wanted - len(self.data))
        except BlockingIOError:
            return False
        except OSError:
            return None
        self.data += data
        return len(self.data) == self.wanted if data else None


class _Dial:
    """The way to one lower rank, tried again until the deadline."""

    def __init__(self, rank: int, address: tuple[str, int]) -> None:
        self.rank = rank
        self.address = address
        self.name = f"{address[0]}:{address[1]}"
        self.next_try = 0.0
        self.door: _Door | None = None
        self.connected = False
        self.trouble = "it was not tried"


class Formation:
    """One rank's way into the mesh; `run` returns a connected socket for every peer."""

    def __init__(
        self,
        own: Hello,
        listener: socket.socket,
        addresses: Mapping[int, tuple[str, int]],
    ) -> None:
        self.own = own  # addressed to nobody yet
        self.listener = listener
        self.dials = {rank: _Dial(rank, addresses[rank]) for rank in range(own.rank)}
        self.joined: dict[int, socket.socket] = {}
        self.stats = Stats()
        self._doors: dict[int, _Door] = {}  # accepted, not admitted; by descriptor, oldest first
        self._refusals: list[str] = []

    def run(self, seconds: float) -> dict[int, socket.socket]:
        deadline = time.monotonic() + seconds
        try:
            while len(self.joined) < self.own.world_size - 1:
                now = time.monotonic()
                if now >= deadline:
                    raise self._missing(seconds)
                self._redial(now)
                self._expire(now)
                self._poll_once(min(deadline - now, RETRY_SECONDS))
        except BaseException:
            for sock in self.joined.values():
                sock.close()
            raise
        finally:
            for door in [*self._doors.values(), *(d.door for d in self.dials.values() if d.door)]:
                if door.sock not in self.joined.values():
                    door.sock.close()
        return self.joined

    def _poll_once(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        for door in self._doors.values():
            poll.register(door.sock, select.POLLIN)
        dialing = {}
        for dial in self.dials.values():
            if dial.door is not None:
                poll.register(dial.door.sock, select.POLLIN if dial.connected else select.POLLOUT)
                dialing[dial.door.sock.fileno()] = dial
        ranks = {sock.fileno(): rank for rank, sock in self.joined.items()}
        for sock in self.joined.values():
            poll.register(sock, _ENDED)
        for fd, _ in poll.poll(seconds * 1000):
            if fd in self._doors:
                self._question(self._doors[fd])
            elif fd in dialing:
                self._pursue(dialing[fd])
            elif fd in ranks:
                if not ended_properly(self.joined[ranks[fd]], ranks[fd]):
                    raise PeerLost(ranks[fd], None, "it closed the connection")
            else:
                self._accept()

    # --- the acceptor's side

    def _accept(self) -> None:
        try:
            sock, address = self.listener.accept()
        except OSError:
            return  # the stranger has left already
        prepare(sock)
        if len(self._doors) >= MAX_STRANGERS:
            oldest = next(iter(self._doors.values()))
            self._drop(oldest, "dropped: too many connections without a HELLO")
        self._doors[sock.fileno()] = _Door(sock, f"{address[0]}:{address[1]}")

    def _question(self, door: _Door) -> None:
        """Reads what a stranger says; admits it, refuses it, or waits for more."""
        if door.refused:
            # A close with unread input would reset the connection and take the reason with it.
            try:
                if not door.sock.recv(4096):
                    self._drop(door)
            except OSError:
                self._drop(door)
            return
        complete = door.read()
        reason = wire.judge_prefix(door.data)
        if reason is not None:
            fatal = door.data[:4] == wire.MAGIC
            self._refuse(door, reason)
            if fatal:
                raise HandshakeRefused(f"{door.name} was refused: {reason}")
        elif complete is None:
            self._drop(door, "left before its HELLO was complete")
        elif complete:
            self._admit(door)

    def _admit(self, door: _Door) -> None:
        hello, _ = wire.decode_hello(door.data)
        reason = wire.refusal(self.own, hello)
        if reason is None and hello.rank < self.own.rank:
            reason = f"rank {self.own.rank} dials rank {hello.rank}, not the other way round"
        if reason is None and hello.rank in self.joined:
            reason = f"rank {hello.rank} has joined already: two processes claim it"
        if reason is not None:
            self._refuse(door, reason, hello.rank)
            if hello.world_size != self.own.world_size:  # such a world can never be complete
                raise HandshakeRefused(reason)
            return
        del self._doors[door.sock.fileno()]
        if self._reply(door, hello.rank):
            self.joined[hello.rank] = door.sock
            self.stats.bytes_received_total += HELLO_SIZE

    def _reply(self, door: _Door, to: int, reason: str = "") -> bool:
        reply = replace(self.own, to=to).encode(reason)
        try:
            door.sock.send(reply)  # the first bytes on this connection: they fit its buffer
        except OSError:
            door.sock.close()
            return False
        self.stats.bytes_sent_total += len(reply)
        return True

    def _refuse(self, door: _Door, reason: str, to: int = wire.NOBODY) -> None:
        self._note(f"{door.name}: {reason}")
        if not self._reply(door, to, reason):
            self._doors.pop(door.sock.fileno(), None)
            return
        door.refused = True
        try:
            door.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(door)

    def _note(self, event: str) -> None:
        log.warning("rank %d refused %s", self.own.rank, event)
        if len(self._refusals) < 8:
            self._refusals.append(event)

    def _drop(self, door: _Door, why: str = "") -> None:
        if why:
            self._note(f"{door.name}: {why}")
        del self._doors[door.sock.fileno()]
        door.sock.close()

    def _expire(self, now: float) -> None:
        for door in [door for door in self._doors.values() if now > door.deadline]:
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
        dial.door = _Door(sock, dial.name)
        dial.connected = False
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            self._again(dial, errno.errorcode.get(code, str(code)))

    def _again(self, dial: _Dial, trouble: str) -> None:
        if dial.door is not None:
            dial.door.sock.close()
            dial.door = None
        dial.trouble = trouble
        dial.next_try = time.monotonic() + RETRY_SECONDS

    def _pursue(self, dial: _Dial) -> None:
        """Takes a dial one step further: connected, HELLO sent, reply read, joined."""
        door = dial.door
        assert door is not None
        if not dial.connected:
            try:
                code = door.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, errno.errorcode.get(code, str(code)))
                # A port of the ephemeral range that nobody listens at can meet its own dial.
                if door.sock.getsockname() == door.sock.getpeername():
                    raise OSError(errno.ECONNREFUSED, "ECONNREFUSED")
                hello = replace(self.own, to=dial.rank)
                self.stats.bytes_sent_total += door.sock.send(hello.encode())
            except OSError as error:
                self._again(dial, error.strerror or str(error))
                return
            dial.connected = True
            return
        complete = door.read()
        foreign = door.data[:4] != wire.MAGIC[: len(door.data)]
        if foreign:
            raise HandshakeRefused(f"{dial.name}, given as rank {dial.rank}, does not speak ASTRA")
        if complete is None:
            self._again(dial, "it closed the connection without an answer")
        elif complete:
            self._conclude(dial, door)

    def _conclude(self, dial: _Dial, door: _Door) -> None:
        """Judges the reply; a refusal's reason has to be read first."""
        try:
            other, reason_size = wire.decode_hello(door.data[:HELLO_SIZE])
        except WireError as error:
            raise HandshakeRefused(f"rank {dial.rank} at {dial.name}: {error}") from error
        if len(door.data) < HELLO_SIZE + reason_size:
            door.wanted = HELLO_SIZE + reason_size
            return
        reason: str | None = door.data[HELLO_SIZE:].decode(errors="replace")
        reason = reason or wire.refusal(self.own, other)
        if not reason and other.rank != dial.rank:
            reason = f"rank {other.rank} answered"
        if reason:
            raise HandshakeRefused(f"rank {dial.rank} at {dial.name} refused: {reason}")
        self.stats.bytes_received_total += len(door.data)
        self.joined[dial.rank] = door.sock
        dial.door = None

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
        if self._refusals:
            text += "; refused meanwhile: " + "; ".join(self._refusals)
        return ConnectFailed(text, missing)

    def _present(self) -> set[int]:
        return {self.own.rank, *self.joined}
