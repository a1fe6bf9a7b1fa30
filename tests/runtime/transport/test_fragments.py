"""Fragments of a frame, their seals and numbers: what docs/wire.md says of a datagram."""

from __future__ import annotations

import pytest

from astra_runtime.transport.fragments import (
    DATAGRAM_SIZE,
    FRAGMENT_SIZE,
    Outbox,
    fragment_layout,
)
from astra_runtime.transport.reassembly import Window
from astra_runtime.transport.seals import HEADER_SIZE, SEAL_SIZE, PlainSeal

from ..ranks import PLAN
from .datagrams import SECRET


def test_the_window_knows_what_it_has_seen() -> None:
    window, seen = Window(), set()
    for number in [5, 3, 4, 5, 1500, 600, 400, 1500, 10**6, 10**6 - 1023, 10**6 - 1024, 2**63, 7]:
        fresh = number not in seen and (window.highest - number) < 1024
        assert window.fresh(number) == fresh
        if fresh:
            window.add(number)
            seen.add(number)


@pytest.mark.parametrize("size", [0, 1, FRAGMENT_SIZE, FRAGMENT_SIZE + 1, 5000, 1 << 20])
def test_parts_fit_and_differ_little(size: int) -> None:
    count, step = fragment_layout(size)
    assert step <= FRAGMENT_SIZE
    assert count == max(1, -(-size // FRAGMENT_SIZE))
    assert (count - 1) * step <= size <= count * step
    outbox = Outbox(3, PlainSeal(SECRET))
    lengths = [len(b"".join(d)) for d in outbox.frame(memoryview(bytes(size)), 0, PLAN)]
    assert max(lengths) <= DATAGRAM_SIZE
    assert sum(lengths) == size + count * (HEADER_SIZE + SEAL_SIZE)


def test_golden_datagrams() -> None:
    """The bytes of docs/wire.md."""
    plain = Outbox(1, PlainSeal(SECRET))
    assert b"".join(plain.probe()).hex() == (
        "00000000000000000000000000000000000001000000000000000000000102030405060708090a0b0c0d0e0f"
    )
    (datagram,) = plain.frame(memoryview(b"\xaa\xbb\xcc"), 3, 0xDEADBEEF)
    assert b"".join(datagram).hex() == (
        "0100000000000000"
        "01000000"
        "efbeadde"
        "0300"
        "0100"
        "03000000"
        "00000000"
        "aabbcc"
        "000102030405060708090a0b0c0d0e0f"
    )
