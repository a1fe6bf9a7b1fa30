"""The C++ decoder behind `wire` against a plain one in Python, on right and wrong bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import astra_kernels as ak
from astra_runtime import wire
from astra_runtime.errors import AstraError, HandshakeRefused, WireError
from astra_runtime.wire import Frame, Header, Hello

from . import wire_reference as reference

RUN = bytes(range(16))
EXPECTED = Header(length=3, sequence=5, plan=0xDEADBEEF, block=3, source=1, call=9, request=7)
wide = st.integers(0, 2**32 - 1)
narrow = st.integers(0, 2**16 - 1)
requests = st.integers(-(2**63), 2**63 - 1)
headers = st.builds(Header, wide, wide, wide, narrow, narrow, wide, requests)


@st.composite
def mutated(draw: Any, good: bytes) -> bytes:
    """`good` with a few bytes changed, and perhaps cut or continued."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.sampled_from([len(data), len(data), draw(st.integers(0, len(data)))]))
    return bytes(data[:cut]) + draw(st.sampled_from([b"", b"", b"\0", draw(st.binary(max_size=9))]))


def judged(call: Callable[[], Any]) -> Any:
    """What the call returns, or the AstraError that it raises."""
    try:
        return call()
    except AstraError as error:
        return error


HEADER = bytes(Frame(3).stamp(*EXPECTED[1:]))[:28]
FACTS = wire.encode_fields({"model": "ab12", "plan": "Grüße, 三 ranks", "a": ""})[:60]


@settings(max_examples=300)
@given(st.one_of(mutated(HEADER), st.binary(max_size=40)))
def test_headers(data: bytes) -> None:
    fault = reference.header_fault(data, EXPECTED)
    if fault is None:
        wire.check_header(data, EXPECTED)
        return
    with pytest.raises(WireError) as caught:
        wire.check_header(data, EXPECTED)
    assert caught.value.field == fault


@given(headers, headers)
def test_headers_of_any_fields(expected: Header, came: Header) -> None:
    data = bytes(Frame(0).stamp(*came[1:]))
    data = came.length.to_bytes(4, "little") + data[4:]
    found = judged(lambda: wire.check_header(data, expected))
    assert getattr(found, "field", None) == reference.header_fault(data, expected)


def test_expected_fields_may_be_wider_than_the_wire() -> None:
    with pytest.raises(WireError, match=f"sequence: expected {2**32}, got 5"):
        wire.check_header(HEADER, EXPECTED._replace(sequence=2**32))
    with pytest.raises(WireError, match="length: expected 4294967299, got 3"):
        wire.check_header(HEADER, EXPECTED._replace(length=2**32 + 3))


@given(st.one_of(mutated(bytes(wire.bye(9, 2))), st.binary(max_size=20)), st.integers(0, 4))
def test_byes(data: bytes, source: int) -> None:
    assert wire.is_bye(data, source) == reference.is_bye(data, source)


@settings(max_examples=300)
@given(st.one_of(mutated(Hello(4, 2, 0, RUN).encode()), st.binary(max_size=40)))
def test_hellos(data: bytes) -> None:
    assert (wire.judge_prefix(data) is None) == (reference.prefix_fault(data) is None)
    wanted = reference.hello(data)
    found = judged(lambda: wire.decode_hello(data))
    if isinstance(found, HandshakeRefused):
        assert wanted == ("version" if "protocol version" in found.reason else "foreign")
    elif isinstance(found, WireError):
        assert wanted == found.field
    else:
        hello, reason = found
        assert wanted == (hello.world_size, hello.rank, hello.to, hello.run, reason)
        assert hello.encode()[:12] == data[:12]


@settings(max_examples=300)
@given(st.one_of(mutated(FACTS), st.binary(max_size=40)))
def test_facts(data: bytes) -> None:
    wanted = reference.facts(data)
    found = judged(lambda: wire.decode_fields(data, 1))
    if wanted is None:
        assert isinstance(found, WireError)
        assert (found.field, found.rank) == ("facts", 1)
    else:
        assert found == wanted
        assert wire.encode_fields(found)[: len(data)] == data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "texts that end within the frame"),
        (b"\x01\x00\x05\x00ab", "texts that end within the frame"),
        (b"\x01\x00\x01\x00\xff\x00\x00", "length-prefixed UTF-8"),
        (b"\x02\x00" + 2 * b"\x01\x00a\x01\x00x", "names in ascending order"),
        (b"\x00\x00\x00\x01", "zeros behind the last text"),
        (bytes(2049), "at most 2048 bytes"),
    ],
)
def test_facts_that_nobody_encodes(data: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        wire.decode_fields(data, 1)


@settings(max_examples=300)
@given(st.data(), st.integers(1, 16), st.integers(0, 40))
def test_codes(data: Any, bits: int, count: int) -> None:
    codewords = data.draw(st.integers(1, 1 << bits))
    size = ak.packed_size(count, bits)
    raw = data.draw(st.one_of(st.binary(min_size=size, max_size=size), st.binary(max_size=size)))
    out = np.full(count + 1, -7, np.int32)
    wanted = reference.codes(raw, bits, codewords, count)
    found = judged(lambda: wire.read_codes(raw, bits, codewords, out, count))
    assert isinstance(found, WireError) == (wanted is None)
    if wanted is not None:
        assert out[:count].tolist() == wanted
        assert ak.pack(out[:count].copy(), bits).tobytes() == raw
    assert out[count] == -7


def test_refused_codes_are_named() -> None:
    out = np.zeros(3, np.int32)
    with pytest.raises(WireError, match="wrong code: expected below 5, got 6"):
        wire.read_codes(b"\x61", 4, 5, out, 2)
    with pytest.raises(WireError, match="zeros behind the last code"):
        wire.read_codes(b"\x81", 4, 5, out, 1)
    with pytest.raises(WireError, match="expected 2 bytes .*, got 1 bytes"):
        wire.read_codes(b"\x11", 4, 5, out, 3)
    with pytest.raises(ValueError, match="out must hold at least 4 codes, got 3"):
        wire.read_codes(b"\x11\x11", 4, 5, out, 4)
