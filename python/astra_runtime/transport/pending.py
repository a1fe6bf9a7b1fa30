"""Pending connections, not trusted yet; the words for why they never were; who has joined."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from typing import Final

from astra_runtime import wire
from astra_runtime.transport.credentials import Contexts
from astra_runtime.transport.stats import Stats
from astra_runtime.transport.stream import Stream, TlsStream
from astra_runtime.wire import HELLO_SIZE, Hello

HANDSHAKE_SECONDS: Final = 5.0  # for one connection, from accept or dial to the checked HELLO
TLS_FIRST_BYTES: Final = (0x14, 0x15, 0x16)  # change of cipher, alert, handshake
ENDED: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_FOREIGN: Final = (18, 19, 20, 21)  # OpenSSL's codes for "nobody I trust has signed this"
_MEANINGS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "showed no certificate",
    "UNSUPPORTED_PROTOCOL": "speaks another version of TLS than 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "speaks another version of TLS than 1.3",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "wants a certificate of this rank",
    "TLSV1_ALERT_UNKNOWN_CA": "refused this rank's certificate: unknown authority",
    "SSLV3_ALERT_BAD_CERTIFICATE": "refused this rank's certificate: not acceptable",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "refused this rank's certificate: it has expired",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "refused this rank's certificate: not acceptable",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "refused this rank's certificate: not for this purpose",
    "TLSV1_ALERT_DECRYPT_ERROR": "refused this rank's certificate: it does not fit its key",
}


def explain(error: ssl.SSLError) -> str:
    """What a peer did, as the end of a sentence that begins with it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _FOREIGN:
            return f"has a certificate of another authority ({error.verify_message})"
        return f"has a certificate that cannot be accepted: {error.verify_message}"
    reason = error.reason or str(error)
    return _MEANINGS.get(reason) or "failed in TLS: " + reason.lower().replace("_", " ")


def is_from_tls(error: ssl.SSLError) -> bool:
    """Whether the peer spoke TLS and only does not fit; garbage fails otherwise."""
    return isinstance(error, ssl.SSLCertVerificationError) or error.reason in _MEANINGS


class PendingConnection:
    """A connection before it counts: what it is, bytes read so far, and when its time is up."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.name = name
        self.deadline = time.monotonic() + HANDSHAKE_SECONDS
        self.stream = Stream(sock)
        self.identified = False  # whether it is TLS or plaintext has been seen
        self.hello_sent = False  # inside TLS, by a dialer that has checked the names
        self.data = bytearray()
        self.wanted = HELLO_SIZE
        self.refused = False

    def peek(self) -> bytes:
        """The first bytes, left where they are; b"" at the end. BlockingIOError: none yet."""
        return self.sock.recv(len(wire.MAGIC), socket.MSG_PEEK)

    def encrypt(self, context: ssl.SSLContext, *, accepting: bool) -> TlsStream:
        self.stream = stream = TlsStream(self.sock, context, accepting=accepting)
        return stream

    def read(self) -> bool | None:
        """Reads towards `wanted` bytes and never past them; None at the end of the stream."""
        piece = memoryview(bytearray(self.wanted - len(self.data)))
        try:
            count = self.stream.read_into(piece)
        except BlockingIOError:
            return False
        except ssl.SSLError:
            raise
        except OSError:
            return None
        self.data += piece[:count]
        return len(self.data) == self.wanted if count else None

    def write(self, data: bytes) -> int:
        """Sends a few bytes, which fit the buffer of a young connection; the bytes on the wire."""
        return sum(self.sock.send(part) for part in self.stream.seal(memoryview(data)))


class Members:
    """The peers that have joined, and what both sides of the bootstrap share.

    own: this rank, addressed to nobody yet. contexts: its keys, made ready; None: plaintext. watch:
    the descriptors of pending connections and of members.
    """

    def __init__(self, own: Hello, contexts: Contexts | None) -> None:
        self.own = own
        self.contexts = contexts
        self.watch = select.epoll()
        self.joined: dict[int, Stream] = {}
        self.rank_of: dict[int, int] = {}  # by descriptor
        self.stats = Stats()

    def join(self, rank: int, stream: Stream) -> None:
        self.joined[rank] = stream
        self.stats.bytes_received_total += stream.received
        self.stats.bytes_sent_total += stream.handshake_sent
        if isinstance(stream, TlsStream):
            stream.trust()
        fd = stream.sock.fileno()
        self.rank_of[fd] = rank
        self.watch.modify(fd, ENDED)

    def drop(self, sock: socket.socket) -> None:
        """Closes a connection that has not joined.

        A process or a helper task that was forked off meanwhile may hold it open a while longer,
        and `watch` would go on telling of it, by a number that is another connection's by then.
        """
        # a dial that has failed at once was never watched
        with contextlib.suppress(OSError):
            self.watch.unregister(sock)
        sock.close()


def misnamed(named: int | None, claimed: int) -> str:
    whose = "a certificate of no rank" if named is None else f"the certificate of rank {named}"
    return f"{whose} was shown for rank {claimed}"
