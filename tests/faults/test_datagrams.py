"""Wrong datagrams through live sockets: strangers' are dropped, a peer's own lies have a name.

Whatever a stranger sends, the frame that is waited for is whole and right afterwards. Who has the
secret can lie; then nothing but a WireError is raised, naming the field and the rank.
"""

from __future__ import annotations

import contextlib
import gc
import random
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest

from astra_runtime.errors import WireError
from astra_runtime.transport.certificates import can_make_keys
from astra_runtime.transport.datagram import DatagramMesh
from astra_runtime.transport.fragments import (
    DATAGRAM_SIZE,
    FEC_GROUP,
    FragmentHeader,
    Outbox,
    fragment_layout,
    num_fec_fragments,
)
from astra_runtime.transport.reassembly import EARLY_BYTES, ByteRange, Inbox
from astra_runtime.transport.seals import (
    HEADER_SIZE,
    SEAL_SIZE,
    EncryptedSeal,
    PlainSeal,
    Seal,
)
from tests.runtime.ranks import together
from tests.runtime.transport.datagrams import content, datagram_mesh, tls_datagram_mesh

from .report import Row
from .wires import PLAN, resident

BLOCK = 3
SIZE = 4999  # five parts, the last one shorter, and one of FEC
PARTS, STEP = fragment_layout(SIZE)
GROUPS = num_fec_fragments(PARTS, FEC_GROUP)
PAYLOAD = content(0, BLOCK, SIZE)
SPARE = PARTS + GROUPS  # the packet number that a wrong datagram may have
TRUE = FragmentHeader(SPARE, 2, PLAN, BLOCK, 0, SIZE, 0)
HEADER = struct.Struct("<QIIHHII")
PATIENCE = 0.4  # seconds that a wait may take; a quarter of it for fragments that never arrive
BATCH = 40  # wrong datagrams beside one frame: the kernel keeps them all
GROWTH = 8 << 20  # bytes that the process may grow over all mutated datagrams
COUNTS = ("refused", "repeated", "late", "dropped", "missing")
COMMAND = "python -m pytest -m faults tests/faults/test_datagrams.py"
SEALS = [False, pytest.param(True, marks=pytest.mark.skipif(not can_make_keys(), reason="no keys"))]
needs_keys = pytest.mark.skipif(not can_make_keys(), reason="no keys")


class Way:
    """Rank 1's mesh, and rank 0's end of its datagrams in the hands of a test."""

    def __init__(self, meshes: Sequence[DatagramMesh]) -> None:
        self.mesh = meshes[1]
        self._ears, self._mouth = meshes[1]._peers[0], meshes[0]._peers[1]
        self.seal: Seal = self._ears.inbox.seal
        self.echo = b"".join(self._ears.outbox.probe())  # as this rank itself would say it
        self.at = self._ears.sock.getsockname()
        self.renew()

    def renew(self) -> None:
        """As after connecting, but for the secret; one frame has been exchanged."""
        with contextlib.suppress(BlockingIOError):
            while True:  # what a WireError has left unread
                self._ears.sock.recv(1)
        self._ears.inbox = Inbox(0, self.seal, FEC_GROUP)
        self.outbox = Outbox(0, self.seal, FEC_GROUP)
        self.before = self.datagrams(0)
        self.say(*self.before)
        assert self.read(0) == (PAYLOAD, [])
        self.outbox._numbers = SPARE + 1

    def datagrams(self, block: int = BLOCK) -> list[bytes]:
        """The next frame of rank 0, well made."""
        return [b"".join(part) for part in self.outbox.frame(memoryview(PAYLOAD), block, PLAN)]

    def sealed(self, header: FragmentHeader, part: bytes) -> bytes:
        return b"".join(self.seal.seal(HEADER.pack(*header), part))

    def say(self, *datagrams: bytes) -> None:
        for datagram in datagrams:
            self._mouth.sock.send(datagram)

    def read(self, block: int = BLOCK) -> tuple[bytes, list[ByteRange]]:
        """What a rank has of a block when its wait ends, and what it knows to be missing."""
        options = {"block": block, "plan": PLAN, "timeout": PATIENCE, "partial": True}
        views = self.mesh.receive({0: SIZE}, **options)  # type: ignore[arg-type]
        if 0 not in views:
            return b"", [(0, SIZE)]
        return bytes(views[0]), list(self.mesh.missing_ranges.get(0, ()))

    def outcome(self, wanted: bytes = PAYLOAD) -> str:
        """What reading a frame comes to: the counts that it raises, or a WireError's field."""
        before = self.mesh.datagrams
        try:
            payload, gaps = self.read()
        except WireError as error:
            return f"WireError {error.field} of rank {error.rank}"
        after = self.mesh.datagrams
        met = [name for name in COUNTS if getattr(after, name) > getattr(before, name)]
        return " ".join(met + ([f"gaps {gaps}"] if gaps else []) + ["wrong"] * (payload != wanted))


@contextlib.contextmanager
def a_way(*, encrypted: bool) -> Iterator[Way]:
    meshes = tls_datagram_mesh(2) if encrypted else datagram_mesh(2)
    try:
        yield Way(meshes)
    finally:
        together([mesh.close for mesh in meshes])


class Wrong(NamedTuple):
    """A datagram, and what it has to lead to; nothing: the frame behind it is as it should be."""

    name: str
    data: bytes
    ends_in: str = ""


def strangers(way: Way) -> Iterator[Wrong]:
    """Who made these does not have the secret, or has recorded what somebody else sent."""
    right = way.datagrams()
    for name, data in (("part", right[0]), ("fec", right[-1])):
        for size in range(len(data)):
            yield Wrong(f"{name} cut to {size}", data[:size], "refused")
    for size in (1, 2, DATAGRAM_SIZE - len(right[0]) + 1, 20_000, 60_000):
        yield Wrong(f"{size} bytes more", right[0] + bytes(size), "refused")
    kind = type(way.seal)
    outbox = Outbox(0, kind(bytes(range(100, 132))), FEC_GROUP)  # type: ignore[call-arg]
    outbox._numbers, outbox._frames = SPARE + 1, 1
    for datagram in outbox.frame(memoryview(PAYLOAD), BLOCK, PLAN):
        yield Wrong("under another secret", b"".join(datagram), "refused")
    yield Wrong("its own words", way.echo, "refused")
    for datagram in way.before:
        yield Wrong("recorded and said again", datagram, "repeated")
    yield Wrong("an HTTP request", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + bytes(60), "refused")
    yield Wrong("ones", b"\xff" * DATAGRAM_SIZE, "refused")
    yield Wrong("zeros", bytes(HEADER_SIZE + SEAL_SIZE), "repeated")


def lies() -> Iterator[tuple[str, FragmentHeader, bytes, str]]:
    """Well sealed, so of the peer itself: a header and a part, and what they have to lead to."""
    first, whole = PAYLOAD[:STEP], DATAGRAM_SIZE - HEADER_SIZE - SEAL_SIZE
    fec, last = PARTS * STEP, (PARTS - 1) * STEP
    of_0 = "of rank 0"
    for size in (0, 1, STEP, SIZE - 1, SIZE + 1, 2**31 - 1, 2**31, 2**32 - 1):
        for offset in (0, last, fec):
            header = TRUE._replace(size=size, offset=offset)
            yield f"size {size} at {offset}", header, first, f"WireError length {of_0}"
    for length in (0, 1, STEP - 2, STEP - 1, STEP, STEP + 1, whole):
        for offset in (0, last, fec):
            if length != (STEP - 1 if offset == last else STEP):
                name = f"{length} bytes at {offset}"
                header = TRUE._replace(offset=offset)
                yield name, header, bytes(length), f"WireError fragment {of_0}"
    wrong: dict[str, tuple[int, ...]] = {
        "offset": (1, STEP - 1, (PARTS + GROUPS) * STEP, 2**31, 2**32 - 1),
        "block": (0, BLOCK - 1, BLOCK + 1, 0xFF00, 0xFFFD, 0xFFFF),
        "plan": (0, PLAN + 1, PLAN << 16, 2**32 - 1),
        "source": (1, 2, 0xFFFF),
    }
    for field, values in wrong.items():
        told = "fragment" if field == "offset" else field
        for value in values:
            header = TRUE._replace(**{field: value})
            yield f"{field} {value}", header, first, f"WireError {told} {of_0}"
    yield "of the frame before", TRUE._replace(frame=1), first, "late"
    for frame in (0, 3, 4, 2**31, 2**32 - 1):  # a greeting, and frames whose turn is yet to come
        yield f"of frame {frame}", TRUE._replace(frame=frame), first, ""
    yield "a part that comes twice", TRUE, first, ""
    for number in range(SPARE):
        yield f"number {number} again", TRUE._replace(number=number), first, "repeated"
    too_old = f"repeated missing gaps [({STEP}, {SIZE})]"  # it makes all that follows too old
    for number in (2**63, 2**64 - 1):
        header = TRUE._replace(number=number)
        yield f"number {number}", header, first, f"{too_old} wrong"


def try_structured(row: Row, *, encrypted: bool) -> None:
    with a_way(encrypted=encrypted) as way:
        wrongs = list(strangers(way))
        wrongs += [Wrong(n, way.sealed(header, part), end) for n, header, part, end in lies()]
        for wrong in wrongs:
            way.renew()
            start = time.perf_counter()
            way.say(wrong.data, *way.datagrams())
            outcome = way.outcome()
            fault = f"{wrong.name}: expected {wrong.ends_in!r}, got {outcome!r}"
            ms = 1e3 * (time.perf_counter() - start)
            row.count(None if outcome == wrong.ends_in else fault, ms)


def mutated(draw: random.Random, right: Sequence[bytes], strange: Outbox) -> bytes:
    """Nearly one of the right datagrams, made without their secret."""
    kind, data = draw.choice(["flip", "flip", "cut", "longer", "random", "mixed", "secret"]), b""
    of = draw.choice(right)
    if kind == "flip":
        changed = bytearray(of)
        for place in draw.sample(range(len(of)), draw.choice([1, 1, 2, 5])):
            changed[place] ^= draw.randrange(1, 256)
        data = bytes(changed)
    elif kind == "cut":
        data = of[: draw.randrange(len(of))]
    elif kind == "longer":
        data = of + draw.randbytes(draw.choice([1, 16, 200, 3000]))
    elif kind == "random":
        data = draw.randbytes(draw.randrange(DATAGRAM_SIZE + 50))
    elif kind == "mixed":
        header, body = draw.sample(list(right), 2)
        data = header[:HEADER_SIZE] + body[HEADER_SIZE:]
    else:
        data = b"".join(draw.choice(strange.frame(memoryview(PAYLOAD), BLOCK, PLAN)))
    return data


def try_mutated(row: Row, count: int, draw: random.Random) -> None:
    """Frames among mutated datagrams, some without a part: nothing else may be missing or wrong."""
    with a_way(encrypted=True) as way:
        strange = Outbox(0, EncryptedSeal(bytes(32)), FEC_GROUP)
        for _ in range(count // BATCH):
            way.renew()
            right = way.datagrams()
            wrong = [mutated(draw, right, strange) for _ in range(BATCH)]
            came, wanted, gaps = list(right), bytearray(PAYLOAD), []
            if draw.random() < 0.3:
                lost = draw.randrange(PARTS)
                del came[PARTS], came[lost]
                gaps = [(lost * STEP, min((lost + 1) * STEP, SIZE))]
                wanted[slice(*gaps[0])] = bytes(gaps[0][1] - gaps[0][0])
            said = wrong + came
            draw.shuffle(said)
            way.say(*said, way.datagrams(BLOCK + 1)[0])  # with which waiting has no sense any more
            before = way.mesh.datagrams
            found, after = way.read(), way.mesh.datagrams
            counted = after.refused + after.repeated - before.refused - before.repeated
            fault = None
            if found != (wanted, gaps) or counted != BATCH:
                fault = f"gaps {found[1]} for {gaps}, {counted} of {BATCH} not taken: {wrong}"
            for _ in range(BATCH):
                row.count(fault)


def lie(draw: random.Random) -> tuple[FragmentHeader, bytes]:
    """A header with up to three wrong fields, and a part of about the right length."""
    choices: dict[str, Callable[[], int]] = {
        "number": lambda: draw.choice([draw.randrange(SPARE), draw.randrange(SPARE, 700)]),
        "frame": lambda: draw.choice([0, 1, 2, 3, draw.randrange(2**32)]),
        "plan": lambda: draw.choice([0, PLAN ^ 1 << draw.randrange(32)]),
        "block": lambda: draw.choice([BLOCK + 1, draw.randrange(2**16)]),
        "source": lambda: draw.choice([0, 1, draw.randrange(2**16)]),
        "size": lambda: draw.choice([SIZE + 1, SIZE - STEP, draw.randrange(2**32)]),
        "offset": lambda: draw.choice([STEP * draw.randrange(PARTS + 2), draw.randrange(2**32)]),
    }
    names = draw.sample(sorted(choices), draw.choice([1, 1, 2, 3]))
    length = draw.choice([STEP, STEP, STEP - 1, draw.randrange(DATAGRAM_SIZE - 44)])
    return TRUE._replace(**{name: choices[name]() for name in names}), draw.randbytes(length)


def truth(header: FragmentHeader, part: bytes) -> tuple[set[str], bytes]:
    """What a lie may lead to, and the payload that a frame has of which it is the first part."""
    if header.number < SPARE:
        return {"repeated"}, PAYLOAD
    if header.source != 0:
        return {"WireError source of rank 0"}, PAYLOAD
    if header.frame != TRUE.frame:
        return {"late" if header.frame == 1 else ""}, PAYLOAD
    wrong = {"plan": "plan", "block": "block", "size": "length"}
    told = {word for name, word in wrong.items() if getattr(header, name) != getattr(TRUE, name)}
    if told:
        return {f"WireError {word} of rank 0" for word in told}, PAYLOAD
    index, rest = divmod(header.offset, STEP)
    length = STEP - 1 if index == PARTS - 1 else STEP
    if rest or index >= PARTS + GROUPS or len(part) != length:
        return {"WireError fragment of rank 0"}, PAYLOAD
    wanted = bytearray(PAYLOAD)
    if index < PARTS:
        wanted[index * STEP : (index + 1) * STEP] = part
    else:  # before the last part comes, the FEC part has given one away for it
        total = int.from_bytes(part, "little")
        for n in range(PARTS - 1):
            total ^= int.from_bytes(PAYLOAD[n * STEP : (n + 1) * STEP], "little")
        wanted[(PARTS - 1) * STEP :] = total.to_bytes(STEP, "little")[: STEP - 1]
    return {""}, bytes(wanted)


def try_lies(row: Row, count: int, draw: random.Random, *, encrypted: bool) -> None:
    with a_way(encrypted=encrypted) as way:
        for _ in range(count):
            way.renew()
            header, part = lie(draw)
            way.outbox._numbers = max(SPARE, header.number) + 1
            way.say(way.sealed(header, part), *way.datagrams())
            allowed, wanted = truth(header, part)
            outcome = way.outcome(wanted)
            fault = f"{header}, {len(part)} bytes: {outcome!r}, not one of {allowed}"
            row.count(None if outcome in allowed else fault)


def try_all(row: Row, count: int, seed: int) -> int:
    """Four fifths strangers' and the rest lies; returns the bytes by which the process grew."""
    draw, before = random.Random(seed), 0
    for share in (0.1, 0.9):  # what the first of them take is not counted
        gc.collect()
        before = resident()
        try_mutated(row, round(0.8 * share * count), draw)
        for encrypted in (False, True):
            try_lies(row, round(0.1 * share * count), draw, encrypted=encrypted)
    gc.collect()
    return resident() - before


@pytest.mark.parametrize("encrypted", SEALS, ids=["plaintext", "sealed"])
def test_structured_faults(encrypted: bool) -> None:
    row = Row("datagram_structured", COMMAND)
    try_structured(row, encrypted=encrypted)
    row.check()


@needs_keys
def test_some_mutated_datagrams() -> None:
    row = Row("datagram_mutated", COMMAND, 1)
    try_all(row, 4000, 1)
    row.check()


def test_another_sender_is_not_heard() -> None:
    """The right words from another address: the kernel keeps them out."""
    with a_way(encrypted=False) as way, socket.socket(type=socket.SOCK_DGRAM) as other:
        for datagram in way.datagrams():
            other.sendto(datagram, way.at)
        assert way.outcome(b"") == f"missing gaps [(0, {SIZE})]"


def test_a_frame_that_was_announced_wrongly_is_found_when_its_turn_comes() -> None:
    with a_way(encrypted=False) as way:
        way.say(way.sealed(TRUE._replace(frame=3, size=2**32 - 1), b"early"))
        way.say(*way.datagrams())
        assert way.outcome() == ""
        assert way.outcome() == "WireError length of rank 0"


def test_frames_that_never_come_take_no_more_memory_than_they_may() -> None:
    """Empty parts of frames far ahead, which a peer can make up for ever."""
    inbox, seal = Inbox(0, PlainSeal(bytes(32))), PlainSeal(bytes(32))
    tracemalloc.start()
    try:
        for number in range(20_000):
            header = TRUE._replace(number=number, frame=number + 5, size=2**32 - 1)
            inbox.take(memoryview(b"".join(seal.seal(HEADER.pack(*header), b""))))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert inbox.stats.dropped > 0
    assert held <= EARLY_BYTES * 1.25


@pytest.mark.faults
@needs_keys
def test_all_structured_faults(record: Callable[[Row], None]) -> None:
    row = Row("datagram_structured", COMMAND)
    for encrypted in (False, True):
        try_structured(row, encrypted=encrypted)
    record(row)
    row.check()


@pytest.mark.faults
@pytest.mark.timeout(600)
@needs_keys
def test_mutated_datagrams(record: Callable[[Row], None]) -> None:
    row, start = Row("datagram_mutated", COMMAND, 0), time.monotonic()
    row.extra["grown_bytes"] = try_all(row, 100_000, 0)
    row.extra["seconds"] = time.monotonic() - start
    record(row)
    row.check()
    assert row.extra["grown_bytes"] < GROWTH
