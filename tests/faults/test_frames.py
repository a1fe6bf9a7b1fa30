"""Wrong frames through live sockets: cut, lengthened, repeated, replayed, mutated; all refused."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest

import astra_kernels as ak
from astra_runtime import AstraError, errors, wire
from astra_runtime.transport.certificates import can_make_keys
from astra_runtime.transport.tcp import TcpMesh

from .report import Row
from .wires import PLAN, Wires, frame, resident

BITS, CODEWORDS, CODES = 5, 21, 41  # 205 bits: three of the last byte are spare
BLOCK = 3
SIZE = ak.packed_size(CODES, BITS)
COMMAND = "python -m pytest -m faults tests/faults/test_frames.py"
REFUSALS = (errors.WireError, errors.PeerLost)
GROWTH = 8 << 20  # bytes that the process may grow over all mutated frames


CODES_SENT = np.random.default_rng(0).integers(0, CODEWORDS, CODES, dtype=np.int32)


def payload() -> bytes:
    return ak.pack(CODES_SENT, BITS).tobytes()


def read(mesh: TcpMesh) -> np.ndarray:
    """What a rank does with the frame of a block; its codes."""
    view = mesh.receive({0: SIZE}, block=BLOCK, plan=PLAN)[0]
    codes = np.empty(CODES, np.int32)
    wire.read_codes(view, BITS, CODEWORDS, codes, CODES)
    return codes


class Wrong(NamedTuple):
    """Bytes that have to be refused. `read_first`: right frames in front of them."""

    name: str
    data: bytes
    read_first: int = 0


RIGHT = frame(payload(), block=BLOCK)


def with_length(length: int) -> bytes:
    return length.to_bytes(4, "little") + RIGHT[4:]


def structured() -> Iterator[Wrong]:
    for size in range(len(RIGHT)):
        yield Wrong(f"cut after {size} bytes", RIGHT[:size])
        if size < len(RIGHT) // 2:
            yield Wrong(f"second cut after {size} bytes", RIGHT + RIGHT[:size], 1)
    yield Wrong("a byte more", frame(payload() + b"\0", block=BLOCK))
    yield Wrong("a byte less", frame(payload()[:-1], block=BLOCK))
    # 2**63 does not fit the field: what a writer that overflows leaves of it, and of its relatives
    for length in (0, 1, SIZE + 16, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 & 0xFFFFFFFF):
        yield Wrong(f"length {length}", with_length(length))
    for sequence in (1, 2, 2**31, 2**32 - 1):
        yield Wrong(f"sequence {sequence}", frame(payload(), sequence=sequence, block=BLOCK))
    for block in (0, BLOCK - 1, BLOCK + 1, 0xFF00, 0xFFFD, 0xFFFE, 0xFFFF):
        yield Wrong(f"block {block}", frame(payload(), block=block))
    for plan in (0, PLAN + 1, PLAN << 16, 2**32 - 1):
        yield Wrong(f"an old run, plan {plan}", frame(payload(), plan=plan, block=BLOCK))
    for source in (1, 2, 0xFFFF):
        yield Wrong(f"source {source}", RIGHT[:14] + source.to_bytes(2, "little") + RIGHT[16:])
    for name in (np.float32, np.float16, np.int8, np.int32):
        dense = np.zeros(CODES, name).tobytes()
        yield Wrong(f"dtype {np.dtype(name)}", frame(dense, block=BLOCK))
    yield Wrong("repeated", RIGHT + RIGHT, 1)
    later = frame(payload(), sequence=1, block=BLOCK)
    yield Wrong("the next in its place", later + RIGHT)
    yield Wrong("left out", RIGHT + frame(payload(), sequence=2, block=BLOCK), 1)
    yield Wrong("a code too large", frame(b"\xff" * SIZE, block=BLOCK))
    spare = payload()[:-1] + bytes([payload()[-1] | 0x80])
    yield Wrong("a bit behind the last code", frame(spare, block=BLOCK))
    yield Wrong("BYE in its place", bytes(wire.bye(0, 0)))
    yield Wrong("TLS in its place", b"\x17\x03\x03\x00\x20" + bytes(32))
    yield Wrong("HTTP in its place", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")


def judged(mesh: TcpMesh, wrong: Wrong) -> tuple[str | None, float | None]:
    """What is wrong with how a rank took it, and how long it took; None: refused, by type."""
    try:
        for _ in range(wrong.read_first):
            read(mesh)
    except AstraError as error:
        return f"{wrong.name}: the right frame in front was refused: {error!r}", None
    start = time.perf_counter()
    try:
        read(mesh)
    except REFUSALS:
        return None, 1e3 * (time.perf_counter() - start)
    except AstraError as error:
        return f"{wrong.name}: {error!r}", None
    return f"{wrong.name}: accepted", None


def try_structured(row: Row, *, encrypted: bool) -> None:
    """Inside TLS it is the peer itself, with its keys, that sends the wrong frame."""
    with contextlib.closing(Wires(encrypted=encrypted)) as wires:
        for wrong in structured():
            with wires.connection() as (mesh, peer):
                peer.say(peer.sealed(wrong.data) if wrong.data else b"")
                row.count(*judged(mesh, wrong))


def mutated(draw: random.Random) -> Wrong:
    """The right frame with a mistake that shows in plaintext: not in codes that are others' too."""
    kind, data = draw.choice(["header", "header", "cut", "insert", "random", "code"]), RIGHT
    if kind == "header":
        for place in draw.sample(range(wire.HEADER_SIZE), draw.choice([1, 1, 2, 3])):
            data = data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :]
    elif kind == "cut":
        data = data[: draw.randrange(len(data))]
    elif kind == "insert":
        place = draw.randrange(wire.HEADER_SIZE)
        data = data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place:]
    elif kind == "random":
        data = b"\0" + draw.randbytes(draw.randrange(60))  # 0 is not how the right one begins
    else:
        codes = np.array(draw.choices(range(CODEWORDS), k=CODES), np.int32)
        codes[draw.randrange(CODES)] = draw.randrange(CODEWORDS, 1 << BITS)
        data = frame(ak.pack(codes, BITS).tobytes(), block=BLOCK)
    return Wrong(f"{kind} {data.hex()}", data)


def mutated_record(draw: random.Random, sealed: bytes) -> Wrong:
    """Inside TLS no change goes unnoticed, wherever it is."""
    for place in draw.sample(range(len(sealed)), draw.choice([1, 1, 2, 5])):
        changed = bytes([sealed[place] ^ draw.randrange(1, 256)])
        sealed = sealed[:place] + changed + sealed[place + 1 :]
    return Wrong(f"record {sealed.hex()}", sealed)


def try_mutated(row: Row, count: int, draw: random.Random, *, encrypted: bool) -> None:
    with contextlib.closing(Wires(encrypted=encrypted)) as wires:
        for _ in range(count):
            with wires.connection() as (mesh, peer):
                wrong = mutated_record(draw, peer.sealed(RIGHT)) if encrypted else mutated(draw)
                peer.say(wrong.data)
                row.count(*judged(mesh, wrong))


def grown(row: Row, count: int, draw: random.Random, *, encrypted: bool) -> int:
    """Bytes by which the process grew over so many mutated frames, after as many as a tenth."""
    try_mutated(row, count // 10, draw, encrypted=encrypted)
    gc.collect()
    before = resident()
    try_mutated(row, count - count // 10, draw, encrypted=encrypted)
    gc.collect()
    return resident() - before


WAYS = [False, pytest.param(True, marks=pytest.mark.skipif(not can_make_keys(), reason="no keys"))]


@pytest.mark.parametrize("encrypted", WAYS, ids=["plaintext", "tls"])
def test_the_right_frame_is_read(encrypted: bool) -> None:
    with (
        contextlib.closing(Wires(encrypted=encrypted)) as wires,
        wires.connection() as (mesh, peer),
    ):
        peer.say(peer.sealed(RIGHT))
        assert read(mesh).tolist() == CODES_SENT.tolist()


@pytest.mark.parametrize("encrypted", WAYS, ids=["plaintext", "tls"])
def test_structured_faults(encrypted: bool) -> None:
    row = Row("frame_structured", COMMAND)
    try_structured(row, encrypted=encrypted)
    row.check()


@pytest.mark.parametrize("encrypted", WAYS, ids=["plaintext", "tls"])
def test_some_mutated_frames(encrypted: bool) -> None:
    row = Row("frame_mutated", COMMAND, 1)
    try_mutated(row, 200 if encrypted else 2000, random.Random(1), encrypted=encrypted)
    row.check()


@pytest.mark.faults
def test_all_structured_faults(record: Callable[[Row], None]) -> None:
    row = Row("frame_structured", COMMAND)
    for encrypted in (False, True):
        try_structured(row, encrypted=encrypted)
    record(row)
    row.check()


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_mutated_frames(record: Callable[[Row], None]) -> None:
    row, draw = Row("frame_mutated", COMMAND, 0), random.Random(0)
    growth = {
        "grown_bytes": grown(row, 95_000, draw, encrypted=False),
        "grown_bytes_tls": grown(row, 5_000, draw, encrypted=True),
    }
    row.extra |= growth
    record(row)
    row.check()
    assert max(growth.values()) < GROWTH
