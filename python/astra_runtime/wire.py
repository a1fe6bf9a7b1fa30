"""The bytes ranks exchange: encoding and checking them, no I/O. `docs/wire.md` is the contract.

A connection opens with one HELLO each way (30 bytes; the reply may carry a reason to refuse) and
then carries frames: a 28-byte header and the payload. The reader always knows which frame to
expect, so a header is checked for equality and its length never decides how much is allocated.

What other ranks sent is checked in C++ (`csrc/include/astra/frame.hpp`), where it can be fuzzed
without Python; here its verdicts become errors.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from astra_runtime.control import Control
from astra_runtime.core import _C
from astra_runtime.errors import HandshakeRefused, WireError

if TYPE_CHECKING:
    from astra_kernels._C import Memory

PROTOCOL_VERSION: Final = 2
MAGIC: Final = b"ASTR"

# payload length, sequence, plan, block, source, call, request
_HEADER: Final = struct.Struct("<IIIHHIq")
HEADER_SIZE: Final = _HEADER.size
NO_REQUEST: Final = -1  # of a call that was given no number, and outside of calls

# magic, version, world size, rank, rank addressed, length of the reason, run
_HELLO: Final = struct.Struct("<4sHHHHH16s")
HELLO_SIZE: Final = _HELLO.size
_PREFIX: Final = struct.Struct("<4sH")  # the part of HELLO that no version may change
MAX_REASON: Final = 512
NO_RUN: Final = bytes(16)
NOBODY: Final = 0xFFFF  # the rank addressed by a reply to bytes that were no HELLO

FIELDS_SIZE: Final = 2048

# What is to be done about ranks that do not speak alike.
SAME_TRANSPORT: Final = "expected the same transport on all ranks (backend of connect, --transport)"
# How torch.distributed greets its store: VALIDATE, and the beginning of a magic number.
_TORCH_STORE: Final = b"\x00\xce\xf7\x85"

# The decoder's verdicts, in the order of frame.hpp; 0: nothing is wrong.
_FIELDS: Final = ("", "size", "source", "sequence", "call", "request", "plan", "block", "length")
_FOREIGN, _OTHER_VERSION, _WRONG_SIZE, _LONG_REASON = 1, 2, 3, 4
_FIELDS_FAULTS: Final = (
    "",
    f"at most {FIELDS_SIZE} bytes",
    "texts that end within the frame",
    "length-prefixed UTF-8",
    "names in ascending order",
    "zeros behind the last text",
)
_WRONG_CODE: Final = 3


class Header(NamedTuple):
    """The first bytes of a frame.

    `length`: of the payload. `plan`: tag of what is computed. `call`: counts the calls of a mesh.
    `request`: the host's own number for it. Frames outside of calls have 0 and `NO_REQUEST`.
    """

    length: int
    sequence: int
    plan: int
    block: int
    source: int
    call: int = 0
    request: int = NO_REQUEST


class Frame:
    """A reusable frame: `payload` is a writable view of `size` bytes, the header lies before it.

    `moment`: call and request that it belongs to, where it is sent later; None: those at sending.
    """

    __slots__ = ("data", "moment", "payload", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.moment: tuple[int, int] | None = None
        self.data = memoryview(bytearray(HEADER_SIZE + size))
        self.payload = self.data[HEADER_SIZE:]

    @classmethod
    def of(cls, payload: bytes | bytearray | memoryview) -> Frame:
        """A frame with a copy of `payload` (any contiguous buffer)."""
        content = memoryview(payload).cast("B")
        frame = cls(content.nbytes)
        frame.payload[:] = content
        return frame

    def stamp(
        self,
        sequence: int,
        plan: int,
        block: int,
        source: int,
        call: int = 0,
        request: int = NO_REQUEST,
    ) -> memoryview:
        """Writes the header and returns the whole frame, ready for one system call."""
        header = (self.size, sequence, plan, block, source, call, request)
        try:
            _HEADER.pack_into(self.data, 0, *header)
        except struct.error as error:
            header = Header(*header)
            raise WireError("header", "fields within their widths", header) from error
        return self.data


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """Reads the header at the start of `data`, which holds at least a whole one."""
    if len(data) < HEADER_SIZE:
        raise WireError("header size", HEADER_SIZE, len(data))
    return Header._make(_HEADER.unpack_from(data))


def encode_header(header: Header) -> bytes:
    """The inverse of `parse_header`."""
    return _HEADER.pack(*header)


def not_finite(header: bytes | bytearray | memoryview) -> bytes:
    """The header of the same frame where its codes stand for no finite numbers."""
    return encode_header(parse_header(header)._replace(block=Control.NOT_FINITE))


def check_header(data: bytes | bytearray | memoryview, expected: Header) -> None:
    """Raises WireError, naming the field, unless `data` starts with exactly `expected`."""
    verdict = _C.check_header(data, expected)
    if verdict:
        raise _differs(_FIELDS[verdict], parse_header(data), expected)


def _differs(name: str, header: Header, expected: Header) -> WireError:
    want, got = getattr(expected, name), getattr(header, name)
    if name == "plan":
        want, got = f"0x{want:08x}", f"0x{got:08x}"
    return WireError(name, want, got, expected.source)


def bye(sequence: int, source: int) -> memoryview:
    """The last frame a rank sends on a connection it ends on purpose."""
    return Frame(0).stamp(sequence, 0, Control.BYE, source)


def is_bye(data: bytes | bytearray | memoryview, source: int) -> bool:
    """Whether `data` starts with the BYE of rank `source` (whatever its sequence number)."""
    return _C.is_bye(data, source)


@dataclass(frozen=True)
class Hello:
    """Who a rank is and whom it means. `run`: 16 bytes all ranks of a run share, or zeros."""

    world_size: int
    rank: int
    to: int
    run: bytes = NO_RUN
    version: int = PROTOCOL_VERSION

    def encode(self, reason: str = "") -> bytes:
        """30 bytes; as a reply, a non-empty `reason` refuses and follows as UTF-8."""
        text = reason.encode()[:MAX_REASON]
        identity = (self.world_size, self.rank, self.to)
        return _HELLO.pack(MAGIC, self.version, *identity, len(text), self.run) + text


def judge_prefix(data: bytes | bytearray | memoryview) -> str | None:
    """Why the bytes read so far cannot become a HELLO of ours, or None while they still can."""
    verdict = _C.judge_prefix(data)
    if verdict == _FOREIGN:
        seen = bytes(data[: len(MAGIC)])
        if seen == _TORCH_STORE:
            return f"torch.distributed calls at a port that speaks ASTRA: {SAME_TRANSPORT}"
        return f"this port speaks ASTRA, the first bytes {seen!r} are something else"
    if verdict == _OTHER_VERSION:
        version: int = _PREFIX.unpack_from(data)[1]
        return f"protocol version {version} came, this rank speaks {PROTOCOL_VERSION}"
    return None


def decode_hello(data: bytes | bytearray | memoryview) -> tuple[Hello, int]:
    """Parses the 30 bytes of a HELLO; also returns the length of the reason that follows."""
    verdict, version, world_size, rank, to, reason_size, run = _C.read_hello(data)
    if verdict == _WRONG_SIZE:
        raise WireError("hello size", HELLO_SIZE, len(data))
    if verdict == _LONG_REASON:
        raise WireError("reason length", f"at most {MAX_REASON}", reason_size)
    if verdict:
        raise HandshakeRefused(judge_prefix(data) or "no HELLO")
    return Hello(world_size, rank, to, run, version), reason_size


def refusal(own: Hello, other: Hello) -> str | None:
    """Why `other` cannot join the world of `own`, in words that both sides can read; or None."""
    if other.world_size != own.world_size:
        return (
            f"rank {other.rank} has world size {other.world_size}, "
            f"rank {own.rank} has {own.world_size}"
        )
    if other.run != own.run:
        ours, theirs = own.run.hex(), other.run.hex()
        return f"rank {other.rank} belongs to run {theirs}, rank {own.rank} to {ours}"
    if other.rank >= own.world_size:
        return f"rank {other.rank} is outside the world of {own.world_size} ranks"
    if other.rank == own.rank:
        return f"rank {own.rank} was claimed by two processes"
    if other.to != own.rank:
        return f"rank {other.rank} looks for rank {other.to} where rank {own.rank} is"
    return None


def encode_fields(fields: Mapping[str, str]) -> bytes:
    """Names and values as length-prefixed UTF-8, zero-padded to FIELDS_SIZE bytes."""
    parts = [struct.pack("<H", len(fields))]
    for text in (item for pair in sorted(fields.items()) for item in pair):
        raw = text.encode()
        parts.append(struct.pack("<H", min(len(raw), 0xFFFF)) + raw)
    data = b"".join(parts)
    if len(data) > FIELDS_SIZE:
        raise ValueError(f"fields: expected at most {FIELDS_SIZE} bytes encoded, got {len(data)}")
    return data.ljust(FIELDS_SIZE, b"\0")


def decode_fields(data: bytes | bytearray | memoryview, rank: int) -> dict[str, str]:
    """Inverse of `encode_fields`; `rank` is the sender, for the error."""
    verdict, position, texts = _C.read_facts(data)
    if verdict:
        raise WireError(
            "facts", _FIELDS_FAULTS[verdict], f"something else at byte {position}", rank
        )
    return dict(zip(texts[::2], texts[1::2], strict=True))


def read_codes(
    data: bytes | bytearray | memoryview, bits: int, codewords: int, out: Memory, count: int
) -> None:
    """Unpacks `count` codes that a rank has packed, and nothing else, into `out`.

    Args:
        data: exactly the bytes that the codes take, `ak.packed_size(count, bits)`.
        codewords: above every code.
        out: contiguous int32, a buffer or (address, elements). Unspecified after an error.

    Raises:
        WireError: another size, a code that no codebook has, a bit set behind the last code.
    """
    verdict, code = _C.read_codes(data, bits, codewords, count, out)
    if verdict == _WRONG_CODE:
        raise WireError("code", f"below {codewords}", code)
    if verdict:
        size = f"{_C.packed_size(count, bits)} bytes with zeros behind the last code"
        raise WireError("payload", size, f"{len(data)} bytes with something else")


def check_codes(
    data: bytes | bytearray | memoryview, bits: int, codewords: int, count: int
) -> None:
    """The errors of `read_codes`, for codes that stay packed.

    Where any `bits` bits are a code, only the size and the bits behind the last code can be wrong.
    """
    behind = count * bits % 8
    whole = codewords == 1 << bits and len(data) == _C.packed_size(count, bits)
    if whole and not (behind and data[-1] >> behind):
        return
    read_codes(data, bits, codewords, memoryview(bytearray(4 * count)).cast("i"), count)


if judge_prefix(Hello(1, 0, 0).encode()) is not None:
    raise ImportError(
        "astra_kernels._C speaks another version of the protocol than astra_runtime: build it, "
        "python setup.py build_ext --inplace"
    )
