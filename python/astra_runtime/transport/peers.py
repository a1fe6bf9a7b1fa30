"""What every mesh with peers of its own shares: who they are, and the numbers of their frames."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from astra_runtime import wire
from astra_runtime.control import is_control, is_of_a_call
from astra_runtime.core import _C
from astra_runtime.transport.lifetime import Lifetime
from astra_runtime.transport.mesh import Mesh
from astra_runtime.transport.stats import Stats
from astra_runtime.wire import HEADER_SIZE, NO_REQUEST, Frame, Header


class Peer:
    """Another rank, and what has crossed between it and this one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.stats = Stats()
        self.moment = (0, NO_REQUEST)  # the call that runs, and the host's number for it


class Channel(Peer):
    """A peer whose frames arrive whole and in order: numbers them, each way from 0.

    own: this rank.
    """

    def __init__(self, own: int, rank: int) -> None:
        super().__init__(rank)
        self.own = own
        self.num_sent = 0  # frames, and so the next sequence number
        self.num_expected = 0  # frames, arrived or not

    def stamp(self, frame: Frame, block: int, plan: int) -> memoryview:
        """The whole frame, ready to be the next one sent; counts it, as yet not in the total."""
        moment = (frame.moment or self.moment) if is_of_a_call(block) else ()
        data = frame.stamp(self.num_sent, plan, block, self.own, *moment)
        self.num_sent += 1
        self.stats.count_sent(frame.size, block)
        return data

    def next_header(self, size: int, block: int, plan: int) -> Header:
        """The header of the next frame to expect."""
        moment = self.moment if is_of_a_call(block) else ()
        header = Header(size, self.num_expected, plan, block, self.rank, *moment)
        self.num_expected += 1
        return header

    def count_arriving(self, size: int, block: int, plan: int) -> Header:
        """Counts a frame that arrived, whose header is to be compared with this one later."""
        self.stats.count_received(size, block)
        self.stats.bytes_received_total += HEADER_SIZE + size
        return self.next_header(size, block, plan)

    def accept(self, data: memoryview | bytes, size: int, block: int, plan: int) -> None:
        """Counts a frame that arrived. Raises WireError where it is not the expected one."""
        wire.check_header(data, self.next_header(size, block, plan))
        self.stats.count_received(size, block)
        self.stats.bytes_received_total += len(data)


P = TypeVar("P", bound=Peer)


class PeerMesh(Mesh, Generic[P]):
    """A mesh that keeps an object for each of its peers."""

    def __init__(self, rank: int, world_size: int, timeout: float, peers: Iterable[P]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._peers = {peer.rank: peer for peer in peers}
        self._lifetime = Lifetime()

    @property
    def stats(self) -> Stats:
        return sum((peer.stats for peer in self._peers.values()), Stats())

    @property
    def peer_stats(self) -> dict[int, Stats]:
        return {rank: peer.stats + Stats() for rank, peer in self._peers.items()}

    @property
    def ended(self) -> str | None:
        return self._lifetime.reason

    @property
    def keeper(self) -> _C.Keeper | None:
        return self._lifetime.keeper

    @keeper.setter
    def keeper(self, keeper: _C.Keeper | None) -> None:
        self._lifetime.keeper = keeper

    def begin(self, request: int | None = None) -> None:
        super().begin(request)
        moment = (self.call, NO_REQUEST if request is None else request)
        for peer in self._peers.values():
            peer.moment = moment

    def _check_open(self) -> None:
        self._lifetime.check()

    def _peer(self, rank: int) -> P:
        self._check_open()
        peer = self._peers.get(rank)
        if peer is None:
            raise ValueError(f"rank: expected one of {sorted(self._peers)}, got {rank}")
        return peer


def slot(block: int) -> int:
    """Which of three buffers a peer's frame is read into: even block, odd block or control."""
    return 2 if is_control(block) else block & 1
