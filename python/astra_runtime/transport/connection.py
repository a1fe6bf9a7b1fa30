"""One TCP connection: writes frames and keeps what the kernel does not take, reads those expected.

Nothing here waits. Frames that come early stay in the kernel's receive buffer until their block is
asked for, so TCP's own flow control slows a rank far ahead.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections import deque

from astra_runtime import wire
from astra_runtime.errors import AstraError, PeerLost, WireError
from astra_runtime.transport import abort
from astra_runtime.transport.peers import Channel, slot
from astra_runtime.transport.stream import Stream
from astra_runtime.wire import HEADER_SIZE, Header


class Connection(Channel):
    """One peer's connection: its unsent bytes, its outstanding frames, the one being read."""

    def __init__(self, own: int, rank: int, stream: Stream) -> None:
        super().__init__(own, rank)
        self.stream = stream
        self.sock = stream.sock
        self.fd = stream.sock.fileno()
        stream.received = 0  # what came before counts as handshake
        self.outstanding: deque[Header] = deque()  # all but the last one are late
        self.error: AstraError | None = None  # why it ended, as far as reading has found
        self.send_closed = False  # what it sent can still be read
        self.unsent: deque[memoryview] = deque()
        self.unsent_bytes = 0
        self.writing = False  # in the middle of a frame, or cut off there by an exception
        self.watched = 0  # poll events registered
        self.slots = [memoryview(bytearray(HEADER_SIZE))] * 3  # even, odd, control
        self.frame = self.slots[0]
        self.filled = 0
        self.reading_abort = False

    def transmit(self, data: memoryview) -> None:
        """Sends now what the kernel takes and keeps the rest, in order, in memory of its own."""
        self.writing = True
        for part in self.stream.seal(data):
            taken = 0
            if not self.unsent:
                try:
                    taken = self.sock.send(part)
                except BlockingIOError:
                    taken = 0
                self.stats.bytes_sent_total += taken
            if taken < len(part):
                rest = part[taken:]
                self.unsent.append(rest if self.stream.encrypted else memoryview(bytes(rest)))
                self.unsent_bytes += len(rest)
        self.writing = False

    def flush(self) -> bool:
        """Sends what it can of the unsent bytes; True when none are left."""
        while self.unsent:
            rest = self.unsent[0]
            self.writing = True
            try:
                taken = self.sock.send(rest)
            except BlockingIOError:
                self.writing = False
                return False
            self.stats.bytes_sent_total += taken
            self.unsent_bytes -= taken
            if taken < len(rest):
                self.unsent[0] = rest[taken:]
                self.writing = False
                return False
            self.unsent.popleft()
            self.writing = False
        return True

    def expect(self, size: int, block: int, plan: int) -> None:
        """Names the next frame; the reader has room for it and for nothing more."""
        self.outstanding.append(self.next_header(size, block, plan))
        if len(self.outstanding) == 1:
            self._begin()

    def _begin(self) -> None:
        size, _, _, block, _ = self.outstanding[0]
        index, total = slot(block), HEADER_SIZE + size
        if len(self.slots[index]) < total:
            self.slots[index] = memoryview(bytearray(total))
        self.frame = self.slots[index][:total]
        self.filled = 0

    def advance(self) -> bool:
        """Reads what has arrived; True when all frames expected so far are complete and correct.

        A late frame is read like any other, into the memory of the one that replaces it.
        """
        while self.outstanding:
            if not self._read():
                return False
            self.outstanding.popleft()
            if self.outstanding:
                self._begin()
        return True

    def _read(self) -> bool:
        """Reads what has arrived of the first outstanding frame; True when that is whole."""
        before = self.filled
        try:
            count = self.stream.read_into(self.frame[before:] if before else self.frame)
        except BlockingIOError:
            return False
        except ssl.SSLError as error:  # nothing that was not sealed by the peer gets any further
            reason = (error.reason or str(error)).lower().replace("_", " ")
            raise WireError("TLS record", "one that it sealed", reason, self.rank) from error
        except OSError as error:
            raise self.lost(error.strerror or str(error)) from error
        if count == 0:
            raise self.lost("it closed the connection")
        self.stats.bytes_received_total = self.stream.received
        self.filled = filled = before + count
        if filled < HEADER_SIZE:
            return False
        if before < HEADER_SIZE:
            try:
                wire.check_header(self.frame, self.outstanding[0])
            except WireError:
                if wire.is_bye(self.frame, self.rank):
                    raise self.lost("it had finished and said BYE") from None
                if not abort.is_abort(self.frame, self.rank):
                    raise
                return self._read_abort()
        if filled < len(self.frame):
            return False
        if self.reading_abort:
            raise self._abort_error()
        return True

    def _read_abort(self) -> bool:
        """Goes on reading an ABORT, which has begun in place of the frame expected."""
        whole = memoryview(bytearray(abort.ABORT_SIZE))
        self.filled = min(self.filled, len(whole))
        whole[: self.filled] = self.frame[: self.filled]
        self.frame, self.reading_abort = whole, True
        if self.filled < len(whole):
            return self._read()
        raise self._abort_error()

    def _abort_error(self) -> AstraError:
        payload, block = self.frame[HEADER_SIZE:], self.outstanding[-1].block
        self.error = abort.decode_error(payload, self.rank, block)
        return self.error

    def lost(self, detail: str) -> PeerLost:
        self.error = PeerLost(self.rank, self.outstanding[-1].block, detail)
        return self.error

    def broken(self, block: int | None, error: OSError) -> AstraError:
        """Why nothing can be sent any more: its abort frame, if that arrived."""
        detail = error.strerror or str(error)
        cause = abort.error_at_end(self.stream, self.rank, block, detail)
        return cause or PeerLost(self.rank, block, "it had finished and said BYE")

    def close_send_side(self) -> None:
        """Sends nothing any more, so that the peer sees an end and no frame without its rest."""
        self.send_closed = True
        self.unsent.clear()
        self.unsent_bytes = 0
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
