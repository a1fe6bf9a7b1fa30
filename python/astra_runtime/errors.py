"""What can go wrong between ranks, each with attributes to act on and a sentence to read."""

from __future__ import annotations

import copy
from typing import TypeVar

from .control import is_control

E = TypeVar("E", bound=BaseException)


def _moment(block: int | None) -> str:
    """Names the wait in which something happened; None is the time before any block."""
    if block is None:
        return "while the ranks connected"
    if is_control(block):
        return f"at control message 0x{block:04x}"
    return f"at block {block}"


class AstraError(Exception):
    """Any failure that ASTRA itself reports. Arguments are kept, so it survives pickling.

    Of a call all ranks raise the same one. After a `CallEnded` engine and mesh are of use as
    before; after any other `Engine.rejoin` connects the ranks again.

    Example:
        try:
            logits = engine(input_ids=ids, within_ms=500).logits
        except CallEnded as error:  # this call alone: error.rank says who, error.reason why
            logits = None
        except AstraError:  # PeerLost, DeadlineExceeded, WireError …
            engine.rejoin()
    """


class ConnectFailed(AstraError):
    """The ranks could not be joined: a port in use, an address nobody answers at.

    Attributes:
        reason: why.
        missing: the ranks that had not joined at the deadline.
    """

    def __init__(self, reason: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(reason, missing)
        self.reason = reason
        self.missing = missing

    def __str__(self) -> str:
        return self.reason


class HandshakeRefused(AstraError):
    """Two ranks do not belong together, by certificate, protocol version, world size, rank, run, or
    by the model, codebook and settings of their engines.

    Attributes:
        reason: what differs.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class PeersRefused(ConnectFailed, HandshakeRefused):
    """Peers were missing at the deadline, and this rank had refused callers: `reason` says why."""

    def __init__(self, reason: str, missing: tuple[int, ...] = ()) -> None:
        AstraError.__init__(self, reason, missing)
        self.reason = reason
        self.missing = missing


class PeerLost(AstraError):
    """A peer's connection ended although the run needs it.

    Attributes:
        rank: the peer.
        block: in which it was missed; None: while the ranks connected.
        detail: what was seen of it.
    """

    def __init__(self, rank: int, block: int | None = None, detail: str = "") -> None:
        super().__init__(rank, block, detail)
        self.rank = rank
        self.block = block
        self.detail = detail

    def __str__(self) -> str:
        tail = f": {self.detail}" if self.detail else ""
        return f"rank {self.rank} was lost {_moment(self.block)}{tail}"


class DeadlineExceeded(AstraError):
    """A wait reached its deadline.

    Attributes:
        rank: the first of `ranks`, all that were still missing.
        block: in which this rank waited; None: while the ranks connected.
        seconds: how long it waited.
    """

    def __init__(
        self, rank: int, block: int | None, seconds: float, ranks: tuple[int, ...] = ()
    ) -> None:
        super().__init__(rank, block, seconds, ranks)
        self.rank = rank
        self.block = block
        self.seconds = seconds
        self.ranks = ranks or (rank,)

    def __str__(self) -> str:
        who = ", ".join(str(rank) for rank in self.ranks)
        plural = "s" if len(self.ranks) > 1 else ""
        return f"rank{plural} {who} sent nothing within {self.seconds:g} s {_moment(self.block)}"


class ModelChanged(AstraError, RuntimeError):
    """The model is not what the engine was made for: its modules, weights or mode have changed."""


class WireError(AstraError):
    """A frame is not the expected one.

    Attributes:
        field: what differs.
        expected, got: its values.
        rank: whose frame; None: not a peer's.
    """

    def __init__(self, field: str, expected: object, got: object, rank: int | None = None) -> None:
        super().__init__(field, expected, got, rank)
        self.field = field
        self.expected = expected
        self.got = got
        self.rank = rank

    @property
    def is_of_a_later_call(self) -> bool:
        """Whether the peer was done with a call in which this rank still awaits a frame of it."""
        expected, got = str(self.expected), str(self.got)  # words already where a frame told them
        numbers = self.field == "call" and expected.isdecimal() and got.isdecimal()
        return numbers and int(got) > int(expected)

    def __str__(self) -> str:
        source = "somebody" if self.rank is None else f"rank {self.rank}"
        if self.field == "plan":
            return (
                f"{source} runs another plan: its tag is {self.got}, expected {self.expected}; "
                "every rank has to be given the same inputs and options"
            )
        if self.is_of_a_later_call:
            return (
                f"{source} has gone on to its call {self.got}, and sends nothing for call "
                f"{self.expected} any more; every rank has to ask for the same answer"
            )
        return f"{source} sent a wrong {self.field}: expected {self.expected}, got {self.got}"


class CallEnded(AstraError):
    """A call that was ended early, on every rank; mesh and engine are of use as before.

    Attributes:
        rank: who ended it.
        reason: why.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(rank, reason)
        self.rank = rank
        self.reason = reason

    def __str__(self) -> str:
        return f"rank {self.rank} ended the call: {self.reason}"


class InvalidChoice(CallEnded, ValueError):
    """`choose` returned something else than a token for each sequence, or raised (`__cause__`)."""


class NotFinite(CallEnded):
    """What other ranks were to receive holds NaN or an infinity, which no code can stand for."""


class InputsDiffer(CallEnded):
    """The ranks were called with different pictures."""


class SessionRefused(CallEnded, ValueError):
    """A session's file that is damaged, or of another model or codebook, or cannot be read."""


class RequestMismatch(CallEnded, WireError):  # type: ignore[misc]  # `rank` is never None here
    """The ranks are out of step: `engine(…, request=n)` was given other numbers on two of them.

    Attributes:
        other: the rank that `rank` has found out of step with itself.
        requests: the numbers of `rank` and of `other`; None: it was given none.
    """

    def __init__(self, rank: int, other: int, requests: tuple[int | None, int | None]) -> None:
        AstraError.__init__(self, rank, other, requests)
        self.rank, self.other, self.requests = rank, other, requests
        self.field, self.expected, self.got = "request", *requests
        ours, theirs = ("no request" if n is None else f"request {n}" for n in requests)
        self.reason = f"it is at {ours}, rank {other} at {theirs}"


def anew(error: E) -> E:
    """A copy of an error that is kept somewhere, to be raised.

    What is raised keeps all frames that it passes through. One that these frames reach would live
    with them until Python's collector runs, which may be never.
    """
    raised = copy.copy(error)
    raised.__cause__ = error.__cause__
    return raised


def ends_the_call_alone(error: BaseException) -> bool:
    """Whether the mesh is as good as before. A plan's tag that differs means other inputs, and a
    later call that this rank wanted an answer which the others do not give."""
    other_inputs = isinstance(error, WireError) and (
        error.field == "plan" or error.is_of_a_later_call
    )
    return other_inputs or isinstance(error, CallEnded | ModelChanged)
