"""ABORT: the last frame of a rank that fails, so that all ranks fail with one cause.

Its payload is an error's encoded fields (`wire.encode_fields`): its name, and its attributes as
text. Whoever reads it raises the same error. What is no error of ASTRA's own concerns the rank that
had it: the others have lost that rank.
"""

from __future__ import annotations

import math
from typing import Final

from astra_runtime import wire
from astra_runtime.control import Control
from astra_runtime.errors import (
    AstraError,
    CallEnded,
    DeadlineExceeded,
    HandshakeRefused,
    InputsDiffer,
    InvalidChoice,
    ModelChanged,
    NotFinite,
    PeerLost,
    RequestMismatch,
    SessionRefused,
    WireError,
)
from astra_runtime.transport.stream import Stream
from astra_runtime.wire import FIELDS_SIZE, HEADER_SIZE, Frame, Header

ABORT_SIZE: Final = HEADER_SIZE + FIELDS_SIZE  # bytes of the whole frame
_MAX_TEXT: Final = 400  # bytes of each text: three of them fit beside the numbers
_MAX_RANKS: Final = 50
_ENDED_CALLS: Final = {
    kind.__name__: kind
    for kind in (CallEnded, InputsDiffer, InvalidChoice, NotFinite, SessionRefused)
}


def abort_frame(
    error: BaseException, *, sequence: int, source: int, block: int | None
) -> memoryview:
    """The frame by which rank `source` reports that `error` ends it, `block` being its last."""
    return encode_error(error, source, block).stamp(sequence, 0, Control.ABORT, source)


def encode_error(error: BaseException, source: int, block: int | None) -> Frame:
    """A frame that `decode_error` reads, to be stamped."""
    return Frame.of(wire.encode_fields(_fields(error, source, block)))


def is_abort(data: bytes | bytearray | memoryview, source: int) -> bool:
    """Whether `data` starts with the header of an ABORT of rank `source`."""
    if len(data) < HEADER_SIZE:
        return False
    header = wire.parse_header(data)
    return header == Header(FIELDS_SIZE, header.sequence, 0, Control.ABORT, source)


def decode_error(
    payload: bytes | bytearray | memoryview, source: int, block: int | None
) -> AstraError:
    """The error to raise for the payload of an ABORT or CANCEL of rank `source`.

    `block`: where this rank is, for a rank that failed before any block.

    Raises WireError where the payload says none.
    """
    fields = wire.decode_fields(payload, source)
    text = {name: printable(value.encode()) for name, value in fields.items()}
    try:
        kind = text["error"]
        rank = _number(text["rank"], -1 if kind == "WireError" else 0)
        block = _number(text["block"]) if "block" in text else block
        if kind == "PeerLost":
            return PeerLost(rank, block, text["detail"])
        if kind == "DeadlineExceeded":
            ranks = tuple(_number(n) for n in text["ranks"].split())
            return DeadlineExceeded(rank, block, _seconds(text["seconds"]), ranks)
        if kind == "WireError":
            return WireError(
                text["field"], text["expected"], text["got"], None if rank < 0 else rank
            )
        if kind == "HandshakeRefused":
            return HandshakeRefused(text["reason"])
        if kind == "RequestMismatch":
            first, second = (_request(n) for n in text["requests"].split(" ", 1))
            return RequestMismatch(rank, _number(text["other"]), (first, second))
        if kind in _ENDED_CALLS:
            return _ENDED_CALLS[kind](rank, text["reason"])
    except (KeyError, ValueError) as error:
        raise WireError("abort", "an error and its fields", text, source) from error
    raise WireError("abort", "the name of an error", kind, source)


def error_at_end(
    stream: Stream, rank: int, block: int | None, detail: str, unread: bytes = b""
) -> AstraError | None:
    """Why the connection of `rank` ended, from the last bytes received of it; None: with BYE.

    `unread`: what was taken from the stream already, and is still to be read.
    """
    tail = (unread + stream.tail(ABORT_SIZE))[-ABORT_SIZE:]
    if wire.is_bye(tail[-HEADER_SIZE:], rank):
        return None
    if len(tail) == ABORT_SIZE and is_abort(tail, rank):
        return decode_error(tail[HEADER_SIZE:], rank, block)
    return PeerLost(rank, block, detail)


def printable(raw: bytes | bytearray) -> str:
    """Text of unknown origin, which may hold anything, for a terminal or a log."""
    text = raw.decode(errors="replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _number(text: str, least: int = 0) -> int:
    """A rank or a block, both of 16 bits: what is passed on must not grow beyond a frame."""
    number = int(text)
    if not least <= number <= 0xFFFF:
        raise ValueError(f"expected {least}..65535, got {number}")
    return number


def _request(text: str) -> int | None:
    if text == "none":
        return None
    number = int(text)
    if not 0 <= number < 2**63:
        raise ValueError(f"request: expected 0..2^63-1, got {text}")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds: expected a finite number, got {text}")
    return seconds


def _fields(error: BaseException, source: int, block: int | None) -> dict[str, str]:
    if isinstance(error, PeerLost):
        rank, block, details = error.rank, error.block, {"detail": error.detail}
    elif isinstance(error, DeadlineExceeded):
        rank, block = error.rank, error.block
        ranks = " ".join(map(str, error.ranks[:_MAX_RANKS]))
        details = {"seconds": repr(error.seconds), "ranks": ranks}
    elif isinstance(error, RequestMismatch):
        rank, block = error.rank, None
        requests = " ".join("none" if n is None else str(n) for n in error.requests)
        details = {"other": str(error.other), "requests": requests}
    elif isinstance(error, WireError):
        rank = -1 if error.rank is None else error.rank
        details = {name: str(getattr(error, name)) for name in ("field", "expected", "got")}
    elif isinstance(error, HandshakeRefused):
        rank, details = source, {"reason": error.reason}
    elif isinstance(error, CallEnded):
        rank, block, details = error.rank, None, {"reason": error.reason}
    elif isinstance(error, ModelChanged):
        return _texts("CallEnded", source, None, {"reason": f"ModelChanged: {error}"})
    else:
        rank, details = source, {"detail": f"{type(error).__name__}: {error}".removesuffix(": ")}
        return _texts("PeerLost", rank, block, details)
    return _texts(type(error).__name__, rank, block, details)


def _texts(kind: str, rank: int, block: int | None, details: dict[str, str]) -> dict[str, str]:
    fields = {"error": kind, "rank": str(rank)}
    if block is not None:
        fields["block"] = str(block)
    return fields | {name: _short(text) for name, text in details.items()}


def _short(text: str) -> str:
    return text.encode()[:_MAX_TEXT].decode(errors="ignore")
