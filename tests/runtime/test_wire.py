"""The bytes on the wire: golden frames, and what is refused before anything is believed."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astra_runtime import errors, wire
from astra_runtime.wire import Frame, Header, Hello

RUN = bytes(range(16))

# docs/wire.md lists the same bytes; a change here is a change of the protocol.
GOLDEN_FRAMES = {
    "block 3 of rank 1": (
        (b"\xaa\xbb\xcc", 5, 0xDEADBEEF, 3, 1),
        "03000000 05000000 efbeadde 0300 0100 00000000 ffffffffffffffff aabbcc",
    ),
    "the same in call 9, request 7": (
        (b"\xaa\xbb\xcc", 5, 0xDEADBEEF, 3, 1, 9, 7),
        "03000000 05000000 efbeadde 0300 0100 09000000 0700000000000000 aabbcc",
    ),
    "empty payload": (
        (b"", 0, 0, 0, 0, 0, 0),
        "00000000 00000000 00000000 0000 0000 00000000 0000000000000000",
    ),
    "largest fields": (
        (b"\x01", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFEF, 0xFFFF, 0xFFFFFFFF, 2**63 - 1),
        "01000000 ffffffff ffffffff efff ffff ffffffff ffffffffffffff7f 01",
    ),
}
GOLDEN_HELLO = "41535452 0200 0400 0200 0000 0000 000102030405060708090a0b0c0d0e0f"
GOLDEN_REFUSAL = "41535452 0200 0400 0000 0200 0600 000102030405060708090a0b0c0d0e0f 6e6f206f6e65"
GOLDEN_BYE = "00000000 09000000 00000000 ffff 0200 00000000 ffffffffffffffff"


def stamped(payload: bytes, *fields: int) -> bytes:
    return bytes(Frame.of(payload).stamp(*fields))


@pytest.mark.parametrize("name", GOLDEN_FRAMES)
def test_golden_frame(name: str) -> None:
    fields, golden = GOLDEN_FRAMES[name]
    assert stamped(*fields) == bytes.fromhex(golden)
    payload, *rest = fields
    assert wire.parse_header(bytes.fromhex(golden)) == Header(len(payload), *rest)


def test_golden_hello_refusal_and_bye() -> None:
    assert Hello(4, 2, 0, RUN).encode() == bytes.fromhex(GOLDEN_HELLO)
    assert wire.decode_hello(bytes.fromhex(GOLDEN_HELLO)) == (Hello(4, 2, 0, RUN), 0)
    assert Hello(4, 0, 2, RUN).encode("no one") == bytes.fromhex(GOLDEN_REFUSAL)
    assert bytes(wire.bye(9, 2)) == bytes.fromhex(GOLDEN_BYE)


def test_sizes() -> None:
    assert wire.HEADER_SIZE == 28
    assert wire.HELLO_SIZE == 30
    assert len(wire.encode_fields({})) == wire.FIELDS_SIZE == 2048


def test_frame_payload_is_in_place() -> None:
    frame = Frame(4)
    frame.payload[:] = b"\x01\x02\x03\x04"
    assert bytes(frame.stamp(0, 0, 0, 0)[28:]) == b"\x01\x02\x03\x04"
    frame.payload[0] = 9
    assert frame.data[28] == 9


@pytest.mark.parametrize(
    "fields",
    [
        (2**32, 0, 0, 0),
        (0, 2**32, 0, 0),
        (0, 0, 2**16, 0),
        (0, 0, 0, -1),
        (0, 0, 0, 0, 2**32),
        (0, 0, 0, 0, 0, 2**63),
    ],
)
def test_a_field_too_wide_is_refused(fields: tuple[int, ...]) -> None:
    with pytest.raises(errors.WireError, match="header"):
        Frame(0).stamp(*fields)


EXPECTED = Header(length=3, sequence=5, plan=0xDEADBEEF, block=3, source=1, call=9, request=7)


@pytest.mark.parametrize(
    ("field", "wrong", "words"),
    [
        ("length", 4, "rank 1 sent a wrong length: expected 3, got 4"),
        ("length", 0, "expected 3, got 0"),
        ("length", 2**31 - 1, "got 2147483647"),
        ("sequence", 4, "rank 1 sent a wrong sequence: expected 5, got 4"),
        ("sequence", 6, "expected 5, got 6"),
        ("plan", 1, "rank 1 runs another plan: its tag is 0x00000001, expected 0xdeadbeef"),
        ("block", 2, "rank 1 sent a wrong block: expected 3, got 2"),
        ("call", 8, "rank 1 sent a wrong call: expected 9, got 8"),
        ("request", -1, "rank 1 sent a wrong request: expected 7, got -1"),
        ("source", 2, "rank 1 sent a wrong source: expected 1, got 2"),
    ],
)
def test_a_wrong_field_is_named(field: str, wrong: int, words: str) -> None:
    header = EXPECTED._replace(**{field: wrong})
    data = stamped(b"", *header[1:])
    data = header.length.to_bytes(4, "little") + data[4:]
    with pytest.raises(errors.WireError) as caught:
        wire.check_header(data, EXPECTED)
    assert (caught.value.field, caught.value.rank) == (field, 1)
    assert words in str(caught.value)


def test_another_plan_is_named_before_its_consequences() -> None:
    with pytest.raises(errors.WireError, match="another plan"):
        wire.check_header(stamped(b"12345", 5, 7, 9, 1, 9, 7), EXPECTED)


@given(position=st.integers(0, 27), value=st.integers(0, 255))
def test_every_mutation_of_a_header_is_refused(position: int, value: int) -> None:
    data = bytearray(stamped(b"abc", *EXPECTED[1:]))
    unchanged = data[position] == value
    data[position] = value
    if unchanged:
        wire.check_header(data, EXPECTED)
    else:
        with pytest.raises(errors.WireError):
            wire.check_header(data, EXPECTED)


@given(st.binary(max_size=40))
def test_any_bytes_as_header_give_a_typed_error(data: bytes) -> None:
    if data[:28] != stamped(b"abc", *EXPECTED[1:])[:28]:
        with pytest.raises(errors.WireError):
            wire.check_header(data, EXPECTED)


@given(st.binary(max_size=40))
def test_any_bytes_as_hello_give_a_typed_error(data: bytes) -> None:
    with pytest.raises((errors.HandshakeRefused, errors.WireError)):
        wire.decode_hello(data)


@given(position=st.integers(0, 29), value=st.integers(0, 255))
def test_a_mutated_hello_never_passes_for_the_same_rank(position: int, value: int) -> None:
    data = bytearray(Hello(4, 2, 0, RUN).encode())
    unchanged = data[position] == value
    data[position] = value
    try:
        hello, reason_size = wire.decode_hello(data)
    except errors.AstraError:
        return
    refused = wire.refusal(Hello(4, 0, 2, RUN), hello) is not None
    assert unchanged or refused or reason_size or hello.rank != 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1\r\n", "b'GET ' are something else"),
        (b"\x16\x03\x01\x02\x00", "something else"),
        (b"ASTR\x03\x00", "protocol version 3 came, this rank speaks 2"),
        (b"ASTA", "something else"),
    ],
)
def test_a_foreign_beginning_is_refused_at_once(data: bytes, words: str) -> None:
    reason = wire.judge_prefix(data)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize("size", range(31))
def test_the_beginning_of_a_hello_can_still_become_one(size: int) -> None:
    assert wire.judge_prefix(Hello(4, 2, 0, RUN).encode()[:size]) is None


def test_a_long_reason_is_bounded() -> None:
    data = Hello(2, 0, 1).encode("x" * 5000)
    assert len(data) == wire.HELLO_SIZE + wire.MAX_REASON
    too_long = data[:12] + (513).to_bytes(2, "little") + data[14:30]
    with pytest.raises(errors.WireError, match="reason length"):
        wire.decode_hello(too_long)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Hello(3, 1, 0, RUN), "rank 1 has world size 3, rank 0 has 4"),
        (Hello(4, 4, 0, RUN), "rank 4 is outside the world of 4 ranks"),
        (Hello(4, 0, 0, RUN), "rank 0 was claimed by two processes"),
        (Hello(4, 3, 1, RUN), "rank 3 looks for rank 1 where rank 0 is"),
        (Hello(4, 1, 0), "rank 1 belongs to run 0000"),
    ],
)
def test_refusals(other: Hello, words: str) -> None:
    reason = wire.refusal(Hello(4, 0, 2, RUN), other)
    assert reason is not None
    assert words in reason


def test_a_fitting_hello_is_not_refused() -> None:
    assert wire.refusal(Hello(4, 0, 2, RUN), Hello(4, 3, 0, RUN)) is None


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=8))
def test_facts_survive(facts: dict[str, str]) -> None:
    assert wire.decode_fields(wire.encode_fields(facts), 1) == facts


def test_too_many_facts_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 2048 bytes"):
        wire.encode_fields({"long": "x" * 3000})


@given(st.binary(max_size=64))
def test_any_bytes_as_facts_give_facts_or_a_typed_error(data: bytes) -> None:
    try:
        facts = wire.decode_fields(data, 3)
    except errors.WireError:
        return
    assert all(isinstance(text, str) for pair in facts.items() for text in pair)


def test_is_bye() -> None:
    assert wire.is_bye(wire.bye(7, 2), 2)
    assert not wire.is_bye(wire.bye(7, 2), 1)
    assert not wire.is_bye(stamped(b"abc", *EXPECTED[1:]), 1)
    assert not wire.is_bye(b"", 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.PeerLost(2, 7), "rank 2 was lost at block 7"),
        (errors.PeerLost(2, None, "reset"), "rank 2 was lost while the ranks connected: reset"),
        (errors.PeerLost(2, 0xFF01), "rank 2 was lost at control message 0xff01"),
        (errors.DeadlineExceeded(1, 3, 0.5), "rank 1 sent nothing within 0.5 s at block 3"),
        (errors.DeadlineExceeded(1, 3, 2.0, (1, 2)), "ranks 1, 2 sent nothing within 2 s"),
        (errors.HandshakeRefused("why"), "why"),
        (errors.ConnectFailed("why", (1,)), "why"),
        (errors.WireError("length", 3, 4), "somebody sent a wrong length: expected 3, got 4"),
    ],
)
def test_errors_speak_and_survive_pickling(error: errors.AstraError, words: str) -> None:
    assert words in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert vars(again) == vars(error)
