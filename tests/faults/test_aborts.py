"""Wrong last words through live sockets: whatever an ABORT says, it ends in an error with a name.

Also its fields are a stranger's until they are checked: a rank that believes them repeats them to
all others, and prints them.
"""

from __future__ import annotations

import contextlib
import gc
import random
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from astra_runtime import wire
from astra_runtime.control import Control
from astra_runtime.errors import AstraError, DeadlineExceeded, HandshakeRefused, PeerLost, WireError
from astra_runtime.transport.abort import abort_frame, decode_error
from astra_runtime.transport.certificates import can_make_keys
from astra_runtime.wire import FIELDS_SIZE, HEADER_SIZE, Frame

from .report import Row
from .wires import PLAN, Wires, resident

BLOCK = 3
SIZE = 100
COMMAND = "python -m pytest -m faults tests/faults/test_aborts.py"
KINDS = (PeerLost, DeadlineExceeded, WireError, HandshakeRefused)
GROWTH = 8 << 20  # bytes that the process may grow over all mutated frames
SEALS = [False, pytest.param(True, marks=pytest.mark.skipif(not can_make_keys(), reason="no keys"))]
LOST = {"error": "PeerLost", "rank": "2", "block": "1", "detail": "killed"}
LATE = {"error": "DeadlineExceeded", "rank": "2", "block": "1", "seconds": "0.5", "ranks": "2 3"}
WRONG = {"error": "WireError", "rank": "2", "field": "plan", "expected": "a", "got": "b"}
REFUSED = {"error": "HandshakeRefused", "rank": "2", "reason": "another model"}
CAUSES = (LOST, LATE, WRONG, REFUSED)


class Said(NamedTuple):
    """Bytes in place of the frame that had to come, and the words that the error has to have."""

    name: str
    data: bytes
    words: str


def abort(fields: dict[str, str] | bytes) -> bytes:
    payload = fields if isinstance(fields, bytes) else wire.encode_fields(fields)
    return bytes(Frame.of(payload).stamp(0, 0, Control.ABORT, 0))


def texts(*raw: bytes, count: int | None = None) -> bytes:
    """A payload of such texts, whatever they are; `count`: as many as it claims, two in each."""
    data = struct.pack("<H", len(raw) // 2 if count is None else count)
    for text in raw:
        data += struct.pack("<H", len(text)) + text
    return data.ljust(FIELDS_SIZE, b"\0")


def wrong_fields() -> Iterator[Said]:
    refused = "rank 0 sent a wrong abort"
    for fields in CAUSES:
        for name in fields:
            if name != "block":  # which may be unknown
                left = {key: text for key, text in fields.items() if key != name}
                yield Said(f"{fields['error']} without {name}", abort(left), refused)
    for kind in (
        "",
        "peerlost",
        "AstraError",
        "ConnectFailed",
        "KeyError",
        "eval",
        "\0",
        "PeerLöst",
    ):
        yield Said(f"error {kind!r}", abort(LOST | {"error": kind}), refused)
    for number in ("", "x", "0x1", "1.0", "1e3", "-2", "65536", "9" * 30, "9" * 1500, "nan"):
        for fields in CAUSES:
            said = abort(fields | {"rank": number})
            yield Said(f"{fields['error']} of rank {number}", said, refused)
    for number in ("", "x", "-1", "65536", "4294967296", "9" * 1500):
        yield Said(f"block {number}", abort(LOST | {"block": number}), refused)
    for seconds in ("", "x", "nan", "inf", "-inf", "-1", "1e999"):
        yield Said(f"{seconds} seconds", abort(LATE | {"seconds": seconds}), refused)
    for ranks in ("x", "1 x", "-1", "1 65536", "9" * 1500):
        yield Said(f"ranks {ranks}", abort(LATE | {"ranks": ranks}), refused)


def wrong_payloads() -> Iterator[Said]:
    refused = "rank 0 sent a wrong facts"
    utf8 = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80")
    for raw in utf8:
        said = texts(b"detail", raw, b"error", b"PeerLost", b"rank", b"2")
        yield Said(f"bad UTF-8 {raw.hex()}", abort(said), refused)
    good = (b"detail", b"x", b"error", b"PeerLost", b"rank", b"2")
    for count in (2, 4, 100, 0xFFFF):
        yield Said(f"{count} texts claimed", abort(texts(*good, count=count)), refused)
    for length in (1, 7, 2040, 0xFFFF):
        data = bytearray(texts(*good))
        struct.pack_into("<H", data, 2, length)
        yield Said(f"a text of {length} claimed", abort(bytes(data)), refused)
    yield Said("in disorder", abort(texts(*good[2:4], *good[:2], *good[4:])), refused)
    yield Said("a name twice", abort(texts(*good[:2], *good)), refused)
    yield Said("more behind", abort(texts(*good)[:-1] + b"x"), refused)


def wrong_frames() -> Iterator[Said]:
    whole = abort(LOST)
    for size in range(len(whole)):
        yield Said(f"cut after {size}", whole[:size], "rank 0 was lost")
    for place, field in ((0, "length"), (8, "plan"), (14, "source")):
        data = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        yield Said(f"another {field}", data, "rank 0 ")
    for fields in CAUSES:
        yield Said(f"a right {fields['error']}", abort(fields), "")


def end_of(wires: Wires, data: bytes) -> AstraError:
    """The error that a rank has which reads these bytes in place of a frame, and tells on."""
    with wires.connection() as (mesh, peer):
        peer.say(peer.sealed(data) if data else b"")
        try:
            mesh.receive({0: SIZE}, block=BLOCK, plan=PLAN)
        except AstraError as error:
            mesh.abort(error)
            return error
    raise AssertionError("a wrong frame was taken")


def fault_of(error: AstraError) -> str | None:
    """What is wrong with an error that came of somebody's words, whatever they were."""
    text = str(error)
    if not isinstance(error, KINDS):
        return f"{error!r} has no name"
    if not text.isprintable():
        return f"not to be shown: {text!r}"
    numbers = [getattr(error, "rank", None), *getattr(error, "ranks", ())]
    if any(number is not None and not 0 <= number <= 0xFFFF for number in numbers):
        return f"no such rank: {text}"
    block = getattr(error, "block", None)
    if block is not None and not 0 <= block <= 0xFFFF:
        return f"no such block: {text}"
    told = abort_frame(error, sequence=0, source=1, block=BLOCK)
    again = decode_error(told[HEADER_SIZE:], 1, BLOCK)
    if type(again) is not type(error) or getattr(again, "rank", 0) != getattr(error, "rank", 0):
        return f"{error!r} becomes {again!r} when it is told on"
    return None


def try_structured(row: Row, *, encrypted: bool) -> None:
    said = [*wrong_fields(), *wrong_payloads(), *wrong_frames()]
    with contextlib.closing(Wires(encrypted=encrypted)) as wires:
        for name, data, words in said[:: 8 if encrypted else 1]:
            start = time.perf_counter()
            error = end_of(wires, data)
            fault = fault_of(error)
            if fault is None and not str(error).startswith(words):
                fault = f"expected {words!r}, got {error}"
            ms = 1e3 * (time.perf_counter() - start)
            row.count(fault and f"{name[:60]}: {fault}", ms)


def mutated(draw: random.Random) -> bytes:
    """An ABORT with mistakes in its bytes or its texts."""
    fields = dict(draw.choice(CAUSES))
    kind = draw.choice(["bytes", "bytes", "texts", "number", "header", "random"])
    if kind == "random":
        return abort(draw.randbytes(draw.randrange(80)).ljust(FIELDS_SIZE, b"\0"))
    if kind == "texts":
        for name in draw.sample(sorted(fields), draw.choice([1, 2])):
            if draw.random() < 0.5:
                del fields[name]
            else:
                raw = draw.randbytes(draw.choice([0, 1, 3, 20, 400]))
                fields[name] = raw.decode(errors="ignore")
    if kind == "number":
        name = draw.choice(sorted({"rank", "block", "seconds", "ranks"} & set(fields)))
        fields[name] = str(draw.randrange(-2, 10 ** draw.choice([1, 4, 6, 40])))
    data = bytearray(abort(fields))
    used = len(bytes(data).rstrip(b"\0"))
    first, stop = (0, HEADER_SIZE) if kind == "header" else (HEADER_SIZE, used)
    if kind in ("bytes", "header"):
        for place in draw.choices(range(first, stop), k=draw.choice([1, 1, 2, 5])):
            data[place] ^= draw.randrange(1, 256)
    return bytes(data)


def try_mutated(row: Row, count: int, draw: random.Random) -> int:
    """Returns the bytes by which the process grew, what the first tenth took not counted."""
    before = resident()
    with contextlib.closing(Wires(encrypted=False)) as wires:
        for number in range(count):
            if number == count // 10:
                gc.collect()
                before = resident()
            data = mutated(draw)
            fault = fault_of(end_of(wires, data))
            row.count(fault and f"{data.hex()}: {fault}")
    gc.collect()
    return resident() - before


@pytest.mark.parametrize("encrypted", SEALS, ids=["plaintext", "tls"])
def test_structured_faults(encrypted: bool) -> None:
    row = Row("abort_structured", COMMAND)
    try_structured(row, encrypted=encrypted)
    row.check()


def test_some_mutated_aborts() -> None:
    row = Row("abort_mutated", COMMAND, 1)
    try_mutated(row, 2000, random.Random(1))
    row.check()


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_mutated_aborts(record: Callable[[Row], None]) -> None:
    structured = Row("abort_structured", COMMAND)
    try_structured(structured, encrypted=False)
    record(structured)
    row, start = Row("abort_mutated", COMMAND, 0), time.monotonic()
    row.extra["grown_bytes"] = try_mutated(row, 30_000, random.Random(0))
    row.extra["seconds"] = time.monotonic() - start
    record(row)
    structured.check()
    row.check()
    assert row.extra["grown_bytes"] < GROWTH
