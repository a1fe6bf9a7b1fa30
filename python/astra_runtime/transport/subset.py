"""Ranks of a mesh, some or all, in an order of their own, as the mesh of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from astra_runtime.errors import AstraError
from astra_runtime.transport.mesh import Mesh, Payload
from astra_runtime.transport.stats import Stats
from astra_runtime.wire import Frame

if TYPE_CHECKING:
    from torch import Tensor

    from astra_runtime.transport.on_device import DeviceFrame


class Subset(Mesh):
    """The ranks `members` of `whole`, counted from 0 in that order.

    The frames are the same; every rank of a call has to use the same view. Errors name ranks as
    `whole` does, which this rank goes on using.

    Example:
        >>> from astra_runtime.transport import local_mesh
        >>> ranks = local_mesh(3)
        >>> Subset(ranks[2], (2, 0)).rank, Subset(ranks[0], (2, 0)).rank
        (0, 1)
    """

    def __init__(self, whole: Mesh, members: Sequence[int]) -> None:
        self.whole, self.members = whole, tuple(members)
        self.rank, self.world_size = self.members.index(whole.rank), len(self.members)
        self._number = {rank: n for n, rank in enumerate(self.members)}
        self.partial, self.lossy, self.resumes = whole.partial, whole.lossy, whole.resumes
        self.timeout, self.options = whole.timeout, whole.options
        self.call, self.request = whole.call, whole.request
        self.device = whole.device

    @property
    def device_rank(self) -> int:
        return self.whole.device_rank

    @property
    def ended(self) -> str | None:
        return self.whole.ended

    @property
    def encrypted(self) -> bool:
        return self.whole.encrypted

    @property
    def stats(self) -> Stats:
        return self.whole.stats

    @property
    def peer_stats(self) -> dict[int, Stats]:
        stats = self.whole.peer_stats
        return {n: stats[rank] for n, rank in enumerate(self.members) if n != self.rank}

    @property
    def missing_ranges(self) -> Mapping[int, Sequence[tuple[int, int]]]:
        ranges = self.whole.missing_ranges
        return {n: ranges[rank] for rank, n in self._number.items() if rank in ranges}

    @property
    def lost(self) -> Mapping[int, AstraError]:
        lost = self.whole.lost
        return {n: lost[rank] for rank, n in self._number.items() if rank in lost}

    def buffer(self, size: int) -> Frame:
        return self.whole.buffer(size)

    def send(
        self, payload: Payload, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        ranks = [self.members[n] for n in to]
        self.whole.send(payload, block=block, plan=plan, to=ranks, partial=partial)

    def receive(
        self,
        sizes: Mapping[int, int],
        *,
        block: int,
        plan: int,
        timeout: float | None = None,
        partial: bool = False,
    ) -> dict[int, memoryview]:
        views = self.whole.receive(
            {self.members[n]: size for n, size in sizes.items()},
            block=block,
            plan=plan,
            timeout=timeout,
            partial=partial,
        )
        return {self._number[rank]: view for rank, view in views.items()}

    def device_buffer(self, size: int) -> DeviceFrame:
        return self.whole.device_buffer(size)

    def receive_on_device(
        self, sizes: Mapping[int, int], *, block: int, plan: int, timeout: float | None = None
    ) -> dict[int, Tensor]:
        members = {self.members[n]: size for n, size in sizes.items()}
        payloads = self.whole.receive_on_device(members, block=block, plan=plan, timeout=timeout)
        return {self._number[rank]: payload for rank, payload in payloads.items()}

    def check_later(self, flag: Tensor, error: AstraError) -> None:
        self.whole.check_later(flag, error)

    def check_received(self) -> None:
        self.whole.check_received()

    def begin(self, request: int | None = None) -> None:
        self.whole.begin(request)
        self.call, self.request = self.whole.call, self.whole.request

    def cancel(self, error: BaseException) -> None:
        self.whole.cancel(error)

    def check_cancelled(self) -> None:
        self.whole.check_cancelled()

    def interrupt(self, reason: str, call: int) -> None:
        self.whole.interrupt(reason, call)

    def end_early(self) -> None:
        self.whole.end_early()

    def flush(self) -> None:
        self.whole.flush()

    def close(self) -> None:
        self.whole.close()

    def abort(self, error: BaseException) -> None:
        self.whole.abort(error)
