"""The bytes of one connection, as they are or inside TLS 1.3; neither ever waits.

`TlsStream` keeps TLS off the socket: what is sent is sealed in memory and leaves like plaintext, in
one system call; what comes is read in large parts, so that records of 16 KiB cost no calls of
their own, and decrypted straight into the frame that awaits it.
"""

from __future__ import annotations

import fcntl
import socket
import ssl
import struct
import termios
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

UNTRUSTED_BYTES: Final = 16 << 10  # read at most before a TLS handshake is complete
_PART: Final = 4096  # read at once during the handshake
_CHUNK: Final = 256 << 10  # read at once afterwards: a usual frame with its records' headers
_SEALED: Final = 1 << 20  # encrypted at once, so that OpenSSL's buffer stays small


class TooMuch(OSError):
    """A caller sent more than any handshake takes."""


class Stream:
    """A connected, non-blocking socket, in plaintext."""

    encrypted = False

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = 0  # bytes read from the socket
        self.handshake_sent = 0  # bytes sent by TLS itself

    def seal(self, data: memoryview) -> Iterable[memoryview]:
        """What has to be sent for `data`, in order; here `data` itself, not a copy."""
        return (data,)

    def read_into(self, view: memoryview) -> int:
        """Reads what has arrived, at most `view`; 0 at the end. BlockingIOError: nothing has."""
        count = self.sock.recv_into(view)
        self.received += count
        return count

    def handshake(self) -> bool:
        """Takes the handshake as far as it goes; True when it is complete."""
        return True

    def certificate(self) -> Mapping[str, Any] | None:
        """The peer's certificate, verified; None in plaintext."""
        return None

    def tail(self, size: int) -> bytes:
        """The last bytes, at most `size`, of what is still unread; they stay unread."""
        (unread,) = struct.unpack("i", fcntl.ioctl(self.sock, termios.FIONREAD, bytes(4)))
        try:
            return self.sock.recv(unread, socket.MSG_PEEK)[-size:] if unread else b""
        except OSError:
            return b""

    def close(self) -> None:
        self.sock.close()


class TlsStream(Stream):
    """A connected, non-blocking socket inside TLS. One thread may read while another seals.

    Its locks are reentrant, since a signal handler may seal an abort frame wherever it interrupts.

    Failures of TLS are `ssl.SSLError`, which is an OSError: catch it first.
    """

    encrypted = True

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, accepting: bool) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=accepting)
        self._lock = threading.RLock()  # OpenSSL allows one call at a time on a connection
        self._chunk = memoryview(bytearray(_PART))
        self._early = bytearray()  # decrypted ahead of time, by `tail`
        self._reading = threading.RLock()  # a link emulator's thread may ask for the tail
        self._complete = False

    def handshake(self) -> bool:
        """Also sends the handshake's own messages, the alert of a failure included."""
        while not self._complete:
            try:
                self._tls.do_handshake()
                self._complete = True
            except ssl.SSLWantReadError:
                self._send_handshake()
                room = self._chunk[: UNTRUSTED_BYTES - self.received]
                if not room:
                    raise TooMuch(f"sent {UNTRUSTED_BYTES} bytes and no HELLO") from None
                try:
                    if not self._feed(room):
                        raise ConnectionResetError("left during the TLS handshake") from None
                except BlockingIOError:
                    return False
            except ssl.SSLError:
                self._send_handshake()
                raise
        self._send_handshake()
        return True

    def begin(self) -> None:
        """Sends the dialer's first message, and reads nothing: the answer may not be TLS."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send_handshake()

    def _send_handshake(self) -> None:
        if self._outgoing.pending:
            data = self._outgoing.read()
            self.handshake_sent += len(data)
            # a few kilobytes at most, the first on their connection: the kernel takes them whole
            if self.sock.send(data) != len(data):
                raise ConnectionResetError("it does not read")

    def certificate(self) -> Mapping[str, Any] | None:
        return self._tls.getpeercert()

    def trust(self) -> None:
        """The peer counts from here on, so its frames may come in large parts."""
        self._chunk = memoryview(bytearray(_CHUNK))

    def seal(self, data: memoryview) -> Iterator[memoryview]:
        """Ciphertext in memory of its own."""
        for start in range(0, len(data), _SEALED):
            with self._lock:
                self._tls.write(data[start : start + _SEALED])
                sealed = memoryview(self._outgoing.read())
            yield sealed

    def read_into(self, view: memoryview) -> int:
        with self._reading:
            if not self._early:
                return self._decrypt_into(view)
            count = min(len(view), len(self._early))
            view[:count] = self._early[:count]
            del self._early[:count]
            return count

    def _decrypt_into(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view):
            count = self._open(view[filled:])
            if count is None:
                try:
                    count = self._feed(self._chunk)
                except BlockingIOError:
                    if not filled:
                        raise
                    return filled
                if count:
                    continue
            if not count:
                return filled
            filled += count
        return filled

    def _open(self, view: memoryview) -> int | None:
        """Decrypts what is at hand; None: more has to be read first, 0: the peer closed TLS."""
        with self._lock:
            # asked beforehand, as an exception costs as much as a small frame's decryption
            if not self._incoming.pending and not self._tls.pending():
                return None
            try:
                return self._tls.read(len(view), view)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                return None

    def _feed(self, room: memoryview) -> int:
        """Hands OpenSSL what has arrived; 0 at the end, BlockingIOError where nothing has."""
        count = self.sock.recv_into(room)
        self.received += count
        with self._lock:
            self._incoming.write(room[:count])
        return count

    def tail(self, size: int) -> bytes:
        """Decrypts all that is left: no more than the kernel's buffer held."""
        piece = memoryview(bytearray(_CHUNK))
        with self._reading:
            try:
                while count := self._decrypt_into(piece):
                    self._early += piece[:count]
            except OSError:  # reset, or not ended yet
                pass
            return bytes(self._early[-size:])
