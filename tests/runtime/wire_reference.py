"""The decoder of `astra_runtime.wire` in plain Python, which the C++ one has to agree with."""

from __future__ import annotations

import itertools
import struct

import numpy as np

MAGIC, VERSION, BYE = b"ASTR", 2, 0xFFFF
FIELDS = ("length", "sequence", "plan", "block", "source", "call", "request")


def header_fault(data: bytes, expected: tuple[int, ...]) -> str | None:
    """The field to name, or None."""
    if len(data) < 28:
        return "header size"
    got = dict(zip(FIELDS, struct.unpack_from("<IIIHHIq", data), strict=True))
    want = dict(zip(FIELDS, expected, strict=True))
    order = ("source", "sequence", "call", "request", "plan", "block", "length")
    return next((name for name in order if got[name] != want[name]), None)


def is_bye(data: bytes, source: int) -> bool:
    if len(data) < 28:
        return False
    length, _, *fields = struct.unpack_from("<IIIHHIq", data)
    return (length, *fields) == (0, 0, BYE, source, 0, -1)


def prefix_fault(data: bytes) -> str | None:
    """ "foreign", "version", or None while the bytes can still become a HELLO."""
    if data[:4] != MAGIC[: len(data[:4])]:
        return "foreign"
    if len(data) >= 6 and struct.unpack_from("<H", data, 4) != (VERSION,):
        return "version"
    return None


def hello(data: bytes) -> tuple[int, ...] | str:
    """World size, rank, rank addressed, run and length of the reason; or what is wrong."""
    fault = prefix_fault(data)
    if fault is not None:
        return fault
    if len(data) != 30:
        return "hello size"
    _, _, world_size, rank, to, reason, run = struct.unpack("<4sHHHHH16s", data)
    return "reason length" if reason > 512 else (world_size, rank, to, run, reason)


def facts(data: bytes) -> dict[str, str] | None:
    """None for bytes that `encode_fields` never makes."""
    texts: list[str] = []
    position = 2
    try:
        if len(data) > 2048:
            return None
        for _ in range(2 * struct.unpack_from("<H", data)[0]):
            (size,) = struct.unpack_from("<H", data, position)
            position += 2 + size
            if position > len(data):
                return None
            texts.append(data[position - size : position].decode())
    except (struct.error, UnicodeDecodeError):
        return None
    names = texts[::2]
    in_order = all(a < b for a, b in itertools.pairwise(names))
    found = dict(zip(names, texts[1::2], strict=True))
    return found if in_order and not any(data[position:]) else None


def codes(data: bytes, bits: int, codewords: int, count: int) -> list[int] | None:
    """None for bytes that no rank packs."""
    if len(data) != (count * bits + 7) // 8:
        return None
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if stream[count * bits :].any():
        return None
    weights = 1 << np.arange(bits)
    found = (stream[: count * bits].reshape(count, bits) * weights).sum(1).tolist()
    return found if max(found, default=-1) < codewords else None
