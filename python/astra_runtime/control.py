"""Every control number of the wire: what a frame carries in its block field when its payload is no
Transformer block's.

Numbers from `Control.FIRST` on are never blocks. Up to `Control.LAST_OF_ENGINE` they belong to the
engine and to tools that drive it; the rest belong to the transport itself. See docs/wire.md.
"""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class Control(IntEnum):
    """Block numbers that are control messages."""

    HEAD = 0xFF00  # final hidden states that the head reads
    TOKEN = 0xFF01  # a generated token, from the rank that decodes
    JOB_SIZE = 0xFF02  # leader to workers: bytes of the job that follows
    JOB = 0xFF03  # its JSON
    REPORT = 0xFF04  # one float64 of each rank, also a barrier
    CLOCK = 0xFF05  # a rank's clock in ns, for timelines
    TRACE_SIZE = 0xFF06  # bytes of the timeline that follows
    TRACE = 0xFF07  # its JSON
    PICTURE = 0xFF08  # means of the picture that a rank was given
    PING = 0xFF10  # link probe: a round trip
    BULK = 0xFF11  # link probe: frames that double in size
    RATES_SIZE = 0xFF12  # bytes of the measured rates that follow
    RATES = 0xFF13  # their JSON
    TOKENS_SIZE = 0xFF20  # bytes of the tokens that follow, from a rank that decodes to the leader
    TOKENS = 0xFF21  # their JSON
    GO_ON = 0xFF22  # leader to workers: the pause in a prefill is over
    SERVICE_SIZE = 0xFF23  # bytes of what a worker says of itself
    SERVICE = 0xFF24  # its JSON
    LAST_OF_ENGINE = 0xFFEF
    CANCEL = 0xFFFB  # why a rank ends the call that runs; later calls are as good as before
    DATAGRAMS = 0xFFFC  # agrees UDP port and secret
    ABORT = 0xFFFD  # the error that ends a rank, so that all ranks raise the same
    FINGERPRINT = 0xFFFE  # `Mesh.agree`: the configuration that every rank must have alike
    BYE = 0xFFFF  # last frame of a rank that finished properly


FIRST_CONTROL = 0xFF00


def is_control(block: int) -> bool:
    """Whether `block` is a control message's number and no Transformer block's."""
    return block >= FIRST_CONTROL


_OF_CALLS = frozenset(
    (
        Control.HEAD,
        Control.TOKEN,
        Control.PICTURE,
        Control.TOKENS_SIZE,
        Control.TOKENS,
        Control.GO_ON,
        Control.CANCEL,
    )
)


def is_of_a_call(block: int) -> bool:
    """Whether such a frame belongs to one call, and to no other when that has ended."""
    return block < FIRST_CONTROL or block in _OF_CALLS
