"""The interface between the engine and whatever carries its frames: N ranks, all connected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Protocol, Self

from astra_runtime import wire
from astra_runtime.errors import HandshakeRefused
from astra_runtime.wire import Frame

Payload = Frame | bytes | bytearray | memoryview


@dataclass(slots=True)
class Stats:
    """Bytes and messages of one rank. `payload`: blocks; `control`: control messages;
    `total`: everything counted at the socket, headers and handshake included."""

    messages_sent: int = 0
    bytes_sent_payload: int = 0
    bytes_sent_control: int = 0
    bytes_sent_total: int = 0
    messages_received: int = 0
    bytes_received_payload: int = 0
    bytes_received_control: int = 0
    bytes_received_total: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class Mesh(Protocol):
    """All ranks of one run. Collective use: each rank sends what its peers receive.

    After any AstraError the mesh is of no further use but to be closed. One thread uses a mesh.
    """

    rank: int
    world_size: int
    timeout: float  # seconds; the deadline of every wait

    @property
    def encrypted(self) -> bool:
        """Whether all that this rank sends and hears is inside TLS."""

    @property
    def stats(self) -> Stats:
        """A snapshot of what has crossed this rank's connections so far; subtract two of them."""

    @property
    def peer_stats(self) -> dict[int, Stats]:
        """The same, for each peer."""

    def agree(self, facts: Mapping[str, str]) -> None:
        """Collective: a fact that differs between ranks raises HandshakeRefused on both sides."""

    def buffer(self, size: int) -> Frame:
        """A reusable frame of `size` payload bytes: write into `.payload`, then `send` it."""

    def send(self, payload: Payload, *, block: int, plan: int, to: Sequence[int]) -> None:
        """Hands one frame to each rank in `to`, in that order, without waiting for the network.

        `block`: the Transformer block, or 0xFF00..0xFFEF for a control message; `plan`: 32-bit tag
        of what this call computes. The buffer may be written again when `send` has returned.
        """

    def receive(self, sizes: Mapping[int, int], *, block: int, plan: int) -> dict[int, memoryview]:
        """Waits for the frame of every rank in `sizes` (rank → expected payload bytes).

        The views are valid until the next `receive` for a block of the same parity: a block's
        codes survive the next block's receive, not the one after. Control
        messages have a slot of their own. Watches every peer, waited for or not.
        """

    def flush(self) -> None:
        """Waits until everything sent was handed to the network."""

    def close(self) -> None:
        """Says BYE, delivers what is unsent, frees everything. Never raises; may be repeated."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def peers_of(mesh: Mesh) -> list[int]:
    """Every rank but this one, the next rank first, so that no receiver is everyone's first."""
    return [(mesh.rank + step) % mesh.world_size for step in range(1, mesh.world_size)]


def agree(mesh: Mesh, facts: Mapping[str, str]) -> None:
    """`Mesh.agree` over any transport: every rank tells every peer, each compares with its own."""
    peers = peers_of(mesh)
    mesh.send(wire.encode_facts(facts), block=wire.FACTS, plan=0, to=peers)
    sizes = dict.fromkeys(peers, wire.FACTS_SIZE)
    views = mesh.receive(sizes, block=wire.FACTS, plan=0)
    for rank in sorted(views):
        difference = _difference(mesh.rank, facts, rank, wire.decode_facts(views[rank], rank))
        if difference is not None:
            mesh.close()  # with BYE: peers still comparing must find the difference, not a loss
            raise HandshakeRefused(difference)


def _difference(
    rank: int, facts: Mapping[str, str], peer: int, peer_facts: Mapping[str, str]
) -> str | None:
    for name in sorted({*facts, *peer_facts}):
        ours, theirs = facts.get(name), peer_facts.get(name)
        if ours != theirs:
            return (
                f"rank {peer} has {f'{name} {theirs}' if theirs is not None else f'no {name}'}, "
                f"rank {rank} has {ours if ours is not None else 'none'}"
            )
    return None
