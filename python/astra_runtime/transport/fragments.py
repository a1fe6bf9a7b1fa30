"""Block frames cut into datagrams: the layout of a frame's fragments, FEC, and the sender's side.

A fragment stands alone: its header says where its bytes belong, and its seal (`seals.py`) that a
peer of this run sent it. The receiver's side is `reassembly.py`. No sockets here.
`docs/wire.md`, "Datagrams", is the contract.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Final, NamedTuple

from astra_runtime.transport.seals import HEADER_SIZE, SEAL_SIZE, Buffer, Seal

HEADER: Final = struct.Struct("<QIIHHII")
DATAGRAM_SIZE: Final = 1232  # what an IPv6 packet of the least MTU, 1280, leaves to UDP
FRAGMENT_SIZE: Final = DATAGRAM_SIZE - HEADER_SIZE - SEAL_SIZE
FEC_GROUP: Final = 8  # fragments that share an FEC fragment, unless told otherwise


class FragmentHeader(NamedTuple):
    """The 28 bytes before a fragment.

    number: of the packet, 0, 1, 2 … for each direction; never repeated under a key.
    frame: counts the sender's block frames to this receiver from 1; 0: a path probe.
    size, offset: bytes of the whole payload, and where this fragment begins in it; the j-th FEC
        fragment begins where fragment count + j would.
    """

    number: int
    frame: int
    plan: int
    block: int
    source: int
    size: int
    offset: int


@dataclass(slots=True)
class DatagramStats:
    """Datagrams of one rank.

    refused: not sealed by the peer, or cut short. repeated: received before. late: of a frame that
    was given up or is whole. dropped: authentic, but without room here, or not taken by the kernel.
    recovered: fragments that FEC has computed before they arrived, if they did. missing: fragments
    that neither arrived in time nor could be recovered.
    """

    sent: int = 0
    received: int = 0
    refused: int = 0
    repeated: int = 0
    late: int = 0
    dropped: int = 0
    recovered: int = 0
    missing: int = 0

    def __add__(self, other: DatagramStats) -> DatagramStats:
        names = [f.name for f in fields(self)]
        return DatagramStats(*(getattr(self, name) + getattr(other, name) for name in names))


def fragment_layout(size: int) -> tuple[int, int]:
    """How a payload of `size` bytes is sent: number of fragments, bytes of each but the last."""
    count = max(1, -(-size // FRAGMENT_SIZE))
    return count, -(-size // count)


def num_fec_fragments(count: int, fec_group: int) -> int:
    """How many FEC fragments follow `count` fragments, one for each `fec_group` of them; 0: none.

    With m of them, the j-th is the exclusive or of the fragments j, j + m, j + 2m …, so that a run
    of losses meets different ones.
    """
    return -(-count // fec_group) if fec_group else 0


def xor(fragments: Iterable[Buffer]) -> int:
    """The exclusive or of fragments as one number, the shorter ones followed by zeros."""
    total = 0
    for fragment in fragments:
        total ^= int.from_bytes(fragment, "little")
    return total


class Outbox:
    """The sender's side of one direction. `fec_group`: see `num_fec_fragments`."""

    def __init__(self, rank: int, seal: Seal, fec_group: int = 0) -> None:
        self.rank = rank  # of this sender
        self._seal = seal
        self._fec_group = fec_group
        self._frames = 0
        self._numbers = 0

    def probe(self) -> Sequence[Buffer]:
        """A datagram without codes, which tests the path."""
        return self._sealed(0, 0, 0, 0, 0, memoryview(b""))

    def frame(self, payload: memoryview, block: int, plan: int) -> list[Sequence[Buffer]]:
        """The datagrams of the next frame, in order."""
        self._frames += 1
        size = len(payload)
        count, step = fragment_layout(size)
        fragments: list[Buffer] = [payload[n * step : (n + 1) * step] for n in range(count)]
        if size:
            num_fec = num_fec_fragments(count, self._fec_group)
            groups = [fragments[j:count:num_fec] for j in range(num_fec)]
            fragments += [xor(group).to_bytes(step, "little") for group in groups]
        return [
            self._sealed(self._frames, plan, block, size, n * step, fragment)
            for n, fragment in enumerate(fragments)
        ]

    def _sealed(
        self, frame: int, plan: int, block: int, size: int, offset: int, fragment: Buffer
    ) -> Sequence[Buffer]:
        header = HEADER.pack(self._numbers, frame, plan, block, self.rank, size, offset)
        self._numbers += 1
        return self._seal.seal(header, fragment)
