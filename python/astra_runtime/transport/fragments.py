"""Block frames cut into datagrams: sealing, checking and joining their parts. No sockets.

A part stands alone: its header says where its bytes belong, and its seal that a peer of this run
sent it. What does not authenticate is counted and otherwise ignored. What does is held to the frame
that has to come, as on a connection: memory is sized by what is expected, not by what is claimed.
`docs/wire.md`, "Datagrams", is the contract.
"""

from __future__ import annotations

import hmac
import math
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Final, NamedTuple, Protocol

from astra_runtime.errors import WireError

_HEADER: Final = struct.Struct("<QIIHHII")
HEADER_SIZE: Final = _HEADER.size
SEAL_SIZE: Final = 16
DATAGRAM_SIZE: Final = 1232  # what an IPv6 packet of the least MTU, 1280, leaves to UDP
PART_SIZE: Final = DATAGRAM_SIZE - HEADER_SIZE - SEAL_SIZE
SECRET_SIZE: Final = 32
REORDERING: Final = 3  # later parts of the same frame after which one is lost, as TCP counts
REORDERING_SECONDS: Final = 0.003  # and the longest wait for one that a later part has overtaken
PARITY: Final = 8  # parts that share a parity part, unless told otherwise
EARLY_BYTES: Final = 4 << 20  # memory for the parts of a peer that is ahead
_EARLY_PART: Final = 800  # of it for each part, besides its bytes: its header as a tuple, a list
_WINDOW: Final = 1024  # packet numbers behind the highest that may still come

Gap = tuple[int, int]  # missing bytes [start, stop) of a frame's payload
Buffer = bytes | bytearray | memoryview


class PartHeader(NamedTuple):
    """The 28 bytes before a part.

    number: of the packet, 0, 1, 2 … for each direction; never repeated under a key.
    frame: counts the sender's block frames to this receiver from 1; 0 greets.
    size, offset: bytes of the whole payload, and where this part begins in it; the j-th parity part
        begins where part count + j would.
    """

    number: int
    frame: int
    plan: int
    block: int
    source: int
    size: int
    offset: int


@dataclass(slots=True)
class DatagramStats:
    """Datagrams of one rank.

    refused: not sealed by the peer, or cut short. repeated: heard before. late: of a frame that was
    given up or is whole. dropped: authentic, but without room here, or not taken by the kernel.
    mended: parts that were computed from their parity before they came, if they did. missing:
    parts that neither came in time nor could be computed.
    """

    sent: int = 0
    received: int = 0
    refused: int = 0
    repeated: int = 0
    late: int = 0
    dropped: int = 0
    mended: int = 0
    missing: int = 0

    def __add__(self, other: DatagramStats) -> DatagramStats:
        names = [f.name for f in fields(self)]
        return DatagramStats(*(getattr(self, name) + getattr(other, name) for name in names))


def cut(size: int) -> tuple[int, int]:
    """How a payload of `size` bytes is sent: number of parts, bytes of each but a shorter last."""
    count = max(1, -(-size // PART_SIZE))
    return count, -(-size // count)


def parities(count: int, parity: int) -> int:
    """How many parity parts follow `count` parts where each has to do for `parity`; 0: none.

    With m of them, the j-th is the sum (exclusive or) of the parts j, j + m, j + 2m …, so that a
    run of losses meets different ones.
    """
    return -(-count // parity) if parity else 0


def _sum(parts: Iterable[Buffer]) -> int:
    """The exclusive or of parts, the shorter ones followed by zeros."""
    total = 0
    for part in parts:
        total ^= int.from_bytes(part, "little")
    return total


class Seal(Protocol):
    """Makes one direction's datagrams, or opens them."""

    def seal(self, header: bytes, part: Buffer) -> Sequence[Buffer]:
        """The datagram, in pieces for one `sendmsg`."""

    def open(self, datagram: memoryview) -> Buffer | None:
        """The part inside; None: whoever made this does not have the secret."""


class EncryptedSeal:
    """AES-256-GCM. The header stays readable and is authenticated; its number is the nonce."""

    def __init__(self, secret: bytes) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher, self._invalid = AESGCM(secret), InvalidTag

    def seal(self, header: bytes, part: Buffer) -> Sequence[Buffer]:
        return header, self._cipher.encrypt(header[:8] + bytes(4), part, header)

    def open(self, datagram: memoryview) -> Buffer | None:
        header, nonce = datagram[:HEADER_SIZE], bytes(datagram[:8]) + bytes(4)
        try:
            return self._cipher.decrypt(nonce, datagram[HEADER_SIZE:], header)
        except self._invalid:
            return None


class PlainSeal:
    """For loopback without keys: parts as they are, then a token that was told over TCP.

    It keeps out what strays here or was meant for another run, not who can read this machine's
    packets.
    """

    def __init__(self, secret: bytes) -> None:
        self._token = secret[:SEAL_SIZE]

    def seal(self, header: bytes, part: Buffer) -> Sequence[Buffer]:
        return header, part, self._token

    def open(self, datagram: memoryview) -> Buffer | None:
        if not hmac.compare_digest(datagram[-SEAL_SIZE:], self._token):
            return None
        return datagram[HEADER_SIZE:-SEAL_SIZE]


class Outbox:
    """The sender's side of one direction. `parity`: see `parities`."""

    def __init__(self, rank: int, seal: Seal, parity: int = 0) -> None:
        self.rank = rank  # of this sender
        self._seal = seal
        self._parity = parity
        self._frames = 0
        self._numbers = 0

    def greeting(self) -> Sequence[Buffer]:
        """A datagram without codes."""
        return self._sealed(0, 0, 0, 0, 0, memoryview(b""))

    def frame(self, payload: memoryview, block: int, plan: int) -> list[Sequence[Buffer]]:
        """The datagrams of the next frame, in order."""
        self._frames += 1
        size = len(payload)
        count, step = cut(size)
        parts: list[Buffer] = [payload[n * step : (n + 1) * step] for n in range(count)]
        if size:
            groups = parities(count, self._parity)
            parts += [_sum(parts[j:count:groups]).to_bytes(step, "little") for j in range(groups)]
        return [
            self._sealed(self._frames, plan, block, size, n * step, part)
            for n, part in enumerate(parts)
        ]

    def _sealed(
        self, frame: int, plan: int, block: int, size: int, offset: int, part: Buffer
    ) -> Sequence[Buffer]:
        header = _HEADER.pack(self._numbers, frame, plan, block, self.rank, size, offset)
        self._numbers += 1
        return self._seal.seal(header, part)


class Window:
    """Which packet numbers have come, as far back as any may still come."""

    def __init__(self) -> None:
        self.highest = -1
        self._seen = 0  # bit i: highest − i

    def fresh(self, number: int) -> bool:
        behind = self.highest - number
        return behind < 0 or (behind < _WINDOW and not self._seen >> behind & 1)

    def add(self, number: int) -> None:
        ahead = number - self.highest
        if ahead >= _WINDOW:
            self._seen = 1
        elif ahead > 0:
            self._seen = (self._seen << ahead | 1) & ((1 << _WINDOW) - 1)
        else:
            self._seen |= 1 << -ahead
        self.highest = max(self.highest, number)


@dataclass(slots=True)
class _Expected:
    """The frame being joined.

    groups: as many as there are parity parts. missing: parts that have not come; sums: parity parts
    that have. first: the packet number of the frame's first part, once one has come. moved: when
    the last one came. finished: given away, whatever was missing, and not to be changed any more.
    """

    plan: int
    block: int
    view: memoryview
    step: int
    count: int
    groups: int
    missing: set[int]
    sums: dict[int, int] = field(default_factory=dict)
    first: int | None = None
    moved: float = 0.0
    finished: bool = False

    def span(self, index: int) -> slice:
        """Where part `index` lies in the payload."""
        return slice(index * self.step, min((index + 1) * self.step, len(self.view)))

    def mend(self, group: int) -> bool:
        """Computes the one part that its group lacks, where its parity part has come."""
        members = range(group, self.count, self.groups)
        lacking = [index for index in members if index in self.missing]
        if len(lacking) != 1 or group not in self.sums:
            return False
        here = (self.view[self.span(index)] for index in members if index != lacking[0])
        part = (self.sums[group] ^ _sum(here)).to_bytes(self.step, "little")
        span = self.span(lacking[0])
        self.view[span] = part[: span.stop - span.start]
        self.missing.remove(lacking[0])
        return True

    @property
    def last_hope(self) -> int:
        """The last part, in the order of sending, that could still tell what is missing."""
        sums = [index % self.groups for index in self.missing] if self.groups else []
        return max(
            [*self.missing, *(self.count + group for group in sums if group not in self.sums)]
        )


_NOTHING: Final = memoryview(b"")


@dataclass(slots=True)
class Inbox:
    """The receiver's side of one direction. Every frame sent is `expect`ed once, in order."""

    rank: int  # of the sender
    seal: Seal
    parity: int = 0  # that of its Outbox
    stats: DatagramStats = field(default_factory=DatagramStats)
    greeted: bool = False
    _window: Window = field(default_factory=Window)
    _frame: int = 0
    _newest: int = 0
    _slots: list[memoryview] = field(default_factory=lambda: [memoryview(bytearray())] * 2)
    _expected: _Expected = field(
        default_factory=lambda: _Expected(0, 0, _NOTHING, 0, 0, 0, set(), finished=True)
    )
    _early: dict[int, list[tuple[PartHeader, bytes]]] = field(default_factory=dict)
    _early_bytes: int = 0

    def expect(self, size: int, block: int, plan: int) -> None:
        """Gives up what is missing of the frame before and makes room for this one.

        Raises WireError where parts that came early belong to something else.
        """
        slot = block & 1
        if len(self._slots[slot]) < size:
            self._slots[slot] = memoryview(bytearray(size))
        count, step = cut(size)
        groups = parities(count, self.parity) if size else 0
        view = self._slots[slot][:size]
        self._frame += 1
        self._expected = _Expected(plan, block, view, step, count, groups, set(range(count)))
        for header, part in self._early.pop(self._frame, ()):
            self._early_bytes -= _EARLY_PART + len(part)
            self._place(header, part)

    def take(self, datagram: memoryview) -> None:
        """Puts a datagram where it belongs. Raises WireError where its sender has the secret and
        still sent something that had not to come."""
        if not HEADER_SIZE + SEAL_SIZE <= len(datagram) <= DATAGRAM_SIZE:
            self.stats.refused += 1
            return
        header = PartHeader._make(_HEADER.unpack_from(datagram))
        if not self._window.fresh(header.number):
            self.stats.repeated += 1
            return
        part = self.seal.open(datagram)
        if part is None:
            self.stats.refused += 1
            return
        self._window.add(header.number)
        self.stats.received += 1
        if header.source != self.rank:
            raise WireError("source", self.rank, header.source, self.rank)
        self._newest = max(self._newest, header.frame)
        if header.frame == 0:
            self.greeted = True
        elif header.frame > self._frame:
            self._keep(header, part)
        elif header.frame == self._frame and not self._expected.finished:
            self._place(header, part)
        else:
            self.stats.late += 1

    def _keep(self, header: PartHeader, part: Buffer) -> None:
        if self._early_bytes + _EARLY_PART + len(part) > EARLY_BYTES:
            self.stats.dropped += 1
            return
        self._early_bytes += _EARLY_PART + len(part)
        self._early.setdefault(header.frame, []).append((header, bytes(part)))

    def _place(self, header: PartHeader, part: Buffer) -> None:
        expected = self._expected
        index = self._index(header, len(part))
        expected.first, expected.moved = header.number - index, time.monotonic()
        if index >= expected.count:
            group = index - expected.count
            expected.sums[group] = int.from_bytes(part, "little")
        elif index in expected.missing:
            expected.view[expected.span(index)] = part
            expected.missing.remove(index)
            group = index % expected.groups if expected.groups else 0
        else:
            return  # its parity part was quicker
        if expected.groups and expected.mend(group):
            self.stats.mended += 1

    def _index(self, header: PartHeader, length: int) -> int:
        """Which part of the expected frame this is, if it is one."""
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
        if rest or index >= expected.count + expected.groups or length != right:
            known = f"one of {expected.count} and {expected.groups} of parity"
            raise WireError("part", known, (header.offset, length), self.rank)
        return index

    @property
    def whole(self) -> bool:
        return not self._expected.missing

    def hope(self, pause: float) -> float:
        """Seconds for which what is missing is still worth waiting for; inf: nothing tells.

        Parts leave in order, a frame's all at once. So what is missing is lost when a later frame
        has begun, when later parts have come and it has not, and when the frame has begun and
        nothing more of it has come for `pause` seconds.
        """
        expected = self._expected
        if not expected.missing or self._newest > self._frame:
            return 0.0
        if expected.first is None:
            return math.inf
        behind = self._window.highest - expected.first - expected.last_hope
        if behind >= REORDERING:
            return 0.0
        longest = min(pause, REORDERING_SECONDS) if behind > 0 else pause
        return max(0.0, expected.moved + longest - time.monotonic())

    def finish(self) -> tuple[memoryview, list[Gap]] | None:
        """The expected frame's payload as far as it came, zeros in its gaps; None: nothing came."""
        expected = self._expected
        expected.finished = True
        self.stats.missing += len(expected.missing)
        if len(expected.missing) == expected.count:
            return None
        gaps: list[Gap] = []
        for index in sorted(expected.missing):
            span = expected.span(index)
            start, stop = span.start, span.stop
            expected.view[start:stop] = bytes(stop - start)
            if gaps and gaps[-1][1] == start:
                start = gaps.pop()[0]
            gaps.append((start, stop))
        return expected.view, gaps
