"""The receiver's side of datagrams: checking fragments and putting frames together. No sockets.

What does not authenticate is counted and otherwise ignored. What does is checked against the
expected frame, as on a connection: memory is sized by what is expected, not by what is claimed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Final

from astra_runtime.errors import WireError
from astra_runtime.transport.fragments import (
    DATAGRAM_SIZE,
    HEADER,
    DatagramStats,
    FragmentHeader,
    fragment_layout,
    num_fec_fragments,
    xor,
)
from astra_runtime.transport.seals import HEADER_SIZE, SEAL_SIZE, Buffer, Seal

REORDERING: Final = 3  # later fragments of the same frame after which one is lost, as TCP counts
REORDERING_SECONDS: Final = 0.003  # the longest wait for one that a later fragment has overtaken
EARLY_BYTES: Final = 4 << 20  # memory for the fragments of a peer that is ahead
_EARLY_OVERHEAD: Final = 800  # of it for each fragment, besides its bytes: a tuple, a list
_WINDOW: Final = 1024  # packet numbers behind the highest that are still accepted

ByteRange = tuple[int, int]  # missing bytes [start, stop) of a frame's payload


class Window:
    """Which packet numbers were received, as far back as any is still accepted."""

    def __init__(self) -> None:
        self.highest = -1
        self._received = 0  # bit i: highest − i

    def fresh(self, number: int) -> bool:
        behind = self.highest - number
        return behind < 0 or (behind < _WINDOW and not self._received >> behind & 1)

    def add(self, number: int) -> None:
        ahead = number - self.highest
        if ahead >= _WINDOW:
            self._received = 1
        elif ahead > 0:
            self._received = (self._received << ahead | 1) & ((1 << _WINDOW) - 1)
        else:
            self._received |= 1 << -ahead
        self.highest = max(self.highest, number)


@dataclass(slots=True)
class _Expected:
    """The frame being put together.

    num_fec: how many FEC fragments it has. missing: fragments that have not arrived; fec: the FEC
    fragments that have. first: the packet number of the frame's first fragment, once one arrived.
    last_arrival: when the last one did. finished: given away, whatever was missing, and not to be
    changed any more.
    """

    plan: int
    block: int
    view: memoryview
    step: int
    count: int
    num_fec: int
    missing: set[int]
    fec: dict[int, int] = field(default_factory=dict)
    first: int | None = None
    last_arrival: float = 0.0
    finished: bool = False

    def span(self, index: int) -> slice:
        """Where fragment `index` lies in the payload."""
        return slice(index * self.step, min((index + 1) * self.step, len(self.view)))

    def recover(self, group: int) -> bool:
        """Computes the one fragment that its group lacks, where its FEC fragment has arrived."""
        members = range(group, self.count, self.num_fec)
        lacking = [index for index in members if index in self.missing]
        if len(lacking) != 1 or group not in self.fec:
            return False
        here = (self.view[self.span(index)] for index in members if index != lacking[0])
        fragment = (self.fec[group] ^ xor(here)).to_bytes(self.step, "little")
        span = self.span(lacking[0])
        self.view[span] = fragment[: span.stop - span.start]
        self.missing.remove(lacking[0])
        return True

    @property
    def last_awaited(self) -> int:
        """The last fragment, in the order of sending, that could still fill what is missing."""
        groups = [index % self.num_fec for index in self.missing] if self.num_fec else []
        return max(
            [*self.missing, *(self.count + group for group in groups if group not in self.fec)]
        )


_NOTHING: Final = memoryview(b"")


@dataclass(slots=True)
class Inbox:
    """The receiver's side of one direction. Every frame sent is `expect`ed once, in order."""

    rank: int  # of the sender
    seal: Seal
    fec_group: int = 0  # that of its Outbox
    stats: DatagramStats = field(default_factory=DatagramStats)
    probed: bool = False
    _window: Window = field(default_factory=Window)
    _frame: int = 0
    _newest: int = 0
    _slots: list[memoryview] = field(default_factory=lambda: [memoryview(bytearray())] * 2)
    _expected: _Expected = field(
        default_factory=lambda: _Expected(0, 0, _NOTHING, 0, 0, 0, set(), finished=True)
    )
    _early: dict[int, list[tuple[FragmentHeader, bytes]]] = field(default_factory=dict)
    _early_bytes: int = 0

    def expect(self, size: int, block: int, plan: int) -> None:
        """Gives up what is missing of the frame before and makes room for this one.

        Raises WireError where fragments that were early belong to something else.
        """
        slot = block & 1
        if len(self._slots[slot]) < size:
            self._slots[slot] = memoryview(bytearray(size))
        count, step = fragment_layout(size)
        num_fec = num_fec_fragments(count, self.fec_group) if size else 0
        view = self._slots[slot][:size]
        self._frame += 1
        self._expected = _Expected(plan, block, view, step, count, num_fec, set(range(count)))
        for header, fragment in self._early.pop(self._frame, ()):
            self._early_bytes -= _EARLY_OVERHEAD + len(fragment)
            self._place(header, fragment)

    def take(self, datagram: memoryview) -> None:
        """Puts a datagram where it belongs. Raises WireError where its sender has the secret and
        still sent something unexpected."""
        if not HEADER_SIZE + SEAL_SIZE <= len(datagram) <= DATAGRAM_SIZE:
            self.stats.refused += 1
            return
        header = FragmentHeader._make(HEADER.unpack_from(datagram))
        if not self._window.fresh(header.number):
            self.stats.repeated += 1
            return
        fragment = self.seal.open(datagram)
        if fragment is None:
            self.stats.refused += 1
            return
        self._window.add(header.number)
        self.stats.received += 1
        if header.source != self.rank:
            raise WireError("source", self.rank, header.source, self.rank)
        self._newest = max(self._newest, header.frame)
        if header.frame == 0:
            self.probed = True
        elif header.frame > self._frame:
            self._store_early(header, fragment)
        elif header.frame == self._frame and not self._expected.finished:
            self._place(header, fragment)
        else:
            self.stats.late += 1

    def _store_early(self, header: FragmentHeader, fragment: Buffer) -> None:
        if self._early_bytes + _EARLY_OVERHEAD + len(fragment) > EARLY_BYTES:
            self.stats.dropped += 1
            return
        self._early_bytes += _EARLY_OVERHEAD + len(fragment)
        self._early.setdefault(header.frame, []).append((header, bytes(fragment)))

    def _place(self, header: FragmentHeader, fragment: Buffer) -> None:
        expected = self._expected
        index = self._index(header, len(fragment))
        expected.first, expected.last_arrival = header.number - index, time.monotonic()
        if index >= expected.count:
            group = index - expected.count
            expected.fec[group] = int.from_bytes(fragment, "little")
        elif index in expected.missing:
            expected.view[expected.span(index)] = fragment
            expected.missing.remove(index)
            group = index % expected.num_fec if expected.num_fec else 0
        else:
            return  # its FEC fragment was quicker
        if expected.num_fec and expected.recover(group):
            self.stats.recovered += 1

    def _index(self, header: FragmentHeader, length: int) -> int:
        """Which fragment of the expected frame this is, if it is one."""
        expected, size = self._expected, len(self._expected.view)
        if header.plan != expected.plan:
            raise WireError("plan", f"0x{expected.plan:08x}", f"0x{header.plan:08x}", self.rank)
        if header.block != expected.block:
            raise WireError("block", expected.block, header.block, self.rank)
        if header.size != size:
            raise WireError("length", size, header.size, self.rank)
        index, rest = divmod(header.offset, expected.step) if size else (header.offset, 0)
        span, right = expected.span(index), expected.step
        if index < expected.count:
            right = span.stop - span.start
        if rest or index >= expected.count + expected.num_fec or length != right:
            known = f"one of {expected.count} and {expected.num_fec} of FEC"
            raise WireError("fragment", known, (header.offset, length), self.rank)
        return index

    @property
    def whole(self) -> bool:
        return not self._expected.missing

    def remaining_wait(self, pause: float) -> float:
        """Seconds for which what is missing is still worth waiting for; inf: nothing tells.

        Fragments leave in order, a frame's all at once. So what is missing is lost when a later
        frame has begun, when later fragments have arrived and it has not, and when the frame has
        begun and nothing more of it has arrived for `pause` seconds.
        """
        expected = self._expected
        if not expected.missing or self._newest > self._frame:
            return 0.0
        if expected.first is None:
            return math.inf
        behind = self._window.highest - expected.first - expected.last_awaited
        if behind >= REORDERING:
            return 0.0
        longest = min(pause, REORDERING_SECONDS) if behind > 0 else pause
        return max(0.0, expected.last_arrival + longest - time.monotonic())

    def finish(self) -> tuple[memoryview, list[ByteRange]] | None:
        """The expected frame's payload as far as it arrived, and its missing ranges, which are
        zeros in it; None: nothing arrived."""
        expected = self._expected
        expected.finished = True
        self.stats.missing += len(expected.missing)
        if len(expected.missing) == expected.count:
            return None
        ranges: list[ByteRange] = []
        for index in sorted(expected.missing):
            span = expected.span(index)
            start, stop = span.start, span.stop
            expected.view[start:stop] = bytes(stop - start)
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, stop))
        return expected.view, ranges
