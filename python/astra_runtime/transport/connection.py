"""One TCP connection: writes frames and keeps what the kernel does not take, reads those expected.

Nothing here waits. Frames that come early stay in the kernel's receive buffer until their block is
asked for, so TCP's own flow control slows a rank far ahead.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections import deque
from typing import Final

from astra_runtime import wire
from astra_runtime.control import Control, is_of_a_call
from astra_runtime.errors import (
    AstraError,
    HandshakeRefused,
    PeerLost,
    RequestMismatch,
    WireError,
    anew,
)
from astra_runtime.transport import abort
from astra_runtime.transport.peers import Channel, slot
from astra_runtime.transport.stream import Stream
from astra_runtime.wire import FIELDS_SIZE, HEADER_SIZE, NO_REQUEST, SAME_TRANSPORT, Header

FINISHED: Final = "it had finished and said BYE"
_STALE_PART: Final = 1 << 16  # bytes dropped at a time


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
        self.reading_error: Control | None = None  # ABORT or CANCEL, if that is being read
        self.unread = b""  # bytes that were read too early
        self.stale = 0  # bytes still to come of a frame of a call that has ended
        self.last_ended = 0  # the last call that ended early here

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
        header = self.outstanding[0]
        index, total = slot(header.block), HEADER_SIZE + header.length
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
        while self.stale:
            room = memoryview(bytearray(min(self.stale, _STALE_PART)))
            count = self._read_into(room)
            if not count:
                return False
            self.stale -= count
        before = self.filled
        count = self._read_into(self.frame[before:] if before else self.frame)
        if not count:
            return False
        self.filled = filled = before + count
        if filled < HEADER_SIZE:
            return False
        if before < HEADER_SIZE:
            try:
                wire.check_header(self.frame, self.outstanding[0])
            except WireError:
                other = self._read_other()
                if other is None:
                    raise
                return other
        if filled < len(self.frame):
            return False
        if self.reading_error:
            raise self._peers_error()
        return True

    def _read_into(self, room: memoryview) -> int:
        """Bytes read; 0: none are here at the moment."""
        if self.unread:
            return self._read_again(room)
        try:
            count = self.stream.read_into(room)
        except BlockingIOError:
            return 0
        except ssl.SSLError as error:
            raise self._foreign_record(error) from error
        except OSError as error:
            raise self.lost(error.strerror or str(error)) from error
        if count == 0:
            raise self.lost("it closed the connection")
        self.stats.bytes_received_total = self.stream.received
        return count

    def _foreign_record(self, error: ssl.SSLError) -> WireError:
        """Nothing that was not sealed by the peer gets any further."""
        reason = (error.reason or str(error)).lower().replace("_", " ")
        return WireError("TLS record", "one that it sealed", reason, self.rank)

    def _read_again(self, room: memoryview) -> int:
        """What was read before, and what follows it at once: TLS may have it in memory already, and
        then no event of the socket tells of it."""
        count = min(len(self.unread), len(room))
        room[:count] = self.unread[:count]
        self.unread = self.unread[count:]
        if count < len(room):
            try:
                count += self.stream.read_into(room[count:])
            except ssl.SSLError as error:
                raise self._foreign_record(error) from error
            except OSError:  # nothing, or an end, which is the next read's to tell
                pass
        self.stats.bytes_received_total = self.stream.received
        return count

    def _read_other(self) -> bool | None:
        """Another frame than expected: the end of the peer, or of its call; None: a fault."""
        if wire.is_bye(self.frame, self.rank):
            raise self.lost(FINISHED) from None
        if abort.is_abort(self.frame, self.rank):
            return self._read_error(Control.ABORT)
        header, expected = wire.parse_header(self.frame), self.outstanding[0]
        if (header.sequence, header.block) == (0, Control.DATAGRAMS):
            raise HandshakeRefused(
                f"rank {self.rank} sends datagrams, rank {self.own} does not: {SAME_TRANSPORT}"
            ) from None
        numbered = (header.source, header.sequence) == (expected.source, expected.sequence)
        if not (numbered and is_of_a_call(header.block)):
            return None
        cancels = header.block == Control.CANCEL and header.length == FIELDS_SIZE
        awaited = expected.call if is_of_a_call(expected.block) else None
        if cancels and header.call == awaited == self.moment[0]:
            return self._read_error(Control.CANCEL)
        ended = self.moment[0] if cancels else self.last_ended
        if header.call <= ended if awaited is None else header.call < self.moment[0]:
            self._drop(header)
            return self._read() if self.outstanding else True
        if awaited is not None and header.call == awaited:
            self._keep_unread()
            if header.request != expected.request and header.request >= NO_REQUEST:
                requests = (_number_or_none(expected.request), _number_or_none(header.request))
                raise RequestMismatch(self.own, self.rank, requests) from None
        if awaited is not None and header.call > awaited:
            self._keep_unread()  # for the call that it is of
            raise WireError("call", awaited, header.call, self.rank) from None
        return None

    def _drop(self, header: Header) -> None:
        """Passes over a frame of a call that has ended, and with a CANCEL over what it replaces."""
        total = HEADER_SIZE + header.length
        self.stale = max(0, total - self.filled)
        self.unread = bytes(self.frame[total : self.filled]) + self.unread
        replaced = 0
        if header.block == Control.CANCEL:
            while self.outstanding and self._ends_with(header.call, self.outstanding[0]):
                self.outstanding.popleft()
                replaced += 1
        self._renumber(1 - replaced)
        if self.outstanding:
            self._begin()

    @staticmethod
    def _ends_with(call: int, header: Header) -> bool:
        return is_of_a_call(header.block) and header.call <= call

    def _renumber(self, count: int) -> None:
        """`count` frames more than expected have come before those outstanding."""
        self.num_expected += count
        self.outstanding = deque(
            header._replace(sequence=header.sequence + count) for header in self.outstanding
        )

    def _keep_unread(self) -> None:
        """What has been read of a frame is to be read again."""
        self.unread = bytes(self.frame[: self.filled]) + self.unread
        self.filled = 0

    def check_cancelled(self) -> None:
        """Raises the cause where the next that the peer has sent is CANCEL of the call that runs.

        Nothing is waited for, and whatever else has arrived is read later.
        """
        while not (self.outstanding or self.stale):
            room = memoryview(bytearray(max(0, abort.ABORT_SIZE - len(self.unread))))
            with contextlib.suppress(BlockingIOError, OSError):  # an end is the next wait's to tell
                self.unread += room[: self.stream.read_into(room)] if room else b""
            if len(self.unread) < abort.ABORT_SIZE:
                return
            header = wire.parse_header(self.unread)
            cancels = (header.length, header.block) == (FIELDS_SIZE, Control.CANCEL)
            if not cancels or header.sequence != self.num_expected or header.call > self.moment[0]:
                return
            payload = self.unread[HEADER_SIZE : abort.ABORT_SIZE]
            self.unread = self.unread[abort.ABORT_SIZE :]
            self.num_expected += 1
            if header.call == self.moment[0]:
                raise abort.decode_error(payload, self.rank, None)

    def expect_nothing(self) -> None:
        """The call that runs ends early: what is left of it will be dropped when it arrives."""
        if self.outstanding and not self.reading_error:
            self._keep_unread()
        self.last_ended = self.moment[0]
        self.num_expected -= len(self.outstanding)
        self.outstanding.clear()

    def _read_error(self, kind: Control) -> bool:
        """Goes on reading an ABORT or CANCEL, which has begun in place of the frame expected."""
        whole = memoryview(bytearray(abort.ABORT_SIZE))
        self.unread = bytes(self.frame[len(whole) : self.filled]) + self.unread
        self.filled = min(self.filled, len(whole))
        whole[: self.filled] = self.frame[: self.filled]
        self.frame, self.reading_error = whole, kind
        if self.filled < len(whole):
            return self._read()
        raise self._peers_error()

    def _peers_error(self) -> AstraError:
        payload, block = self.frame[HEADER_SIZE:], self.outstanding[-1].block
        error = abort.decode_error(payload, self.rank, block)
        if self.reading_error == Control.ABORT:
            self.error = anew(error)
        else:
            self.reading_error = None
            self._renumber(1)
            self._begin()
        return error

    def lost(self, detail: str) -> PeerLost:
        self.error = PeerLost(self.rank, self.outstanding[-1].block, detail)
        return anew(self.error)

    def broken(self, block: int | None, error: OSError) -> AstraError:
        """Why nothing can be sent any more: its abort frame, if that arrived."""
        detail = error.strerror or str(error)
        cause = abort.error_at_end(self.stream, self.rank, block, detail, self.unread)
        return cause or PeerLost(self.rank, block, FINISHED)

    def close_send_side(self) -> None:
        """Sends nothing any more, so that the peer sees an end and no frame without its rest."""
        self.send_closed = True
        self.unsent.clear()
        self.unsent_bytes = 0
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)


def _number_or_none(request: int) -> int | None:
    return None if request == NO_REQUEST else request
