"""Some ranks of a mesh, in an order of their own, as the mesh of a call that needs no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from astra_runtime.transport.mesh import Mesh, Payload
from astra_runtime.transport.stats import Stats
from astra_runtime.wire import Frame


class Subset(Mesh):
    """The ranks `members` of `whole`, counted from 0 in that order.

    What begins, ends and closes calls stays with `whole`, which this rank goes on using.

    Example:
        >>> from astra_runtime.transport import local_mesh
        >>> ranks = local_mesh(3)
        >>> Subset(ranks[2], (2, 0)).rank, Subset(ranks[0], (2, 0)).rank
        (0, 1)
    """

    def __init__(self, whole: Mesh, members: Sequence[int]) -> None:
        self.whole, self.members = whole, tuple(members)
        self.rank, self.world_size = self.members.index(whole.rank), len(self.members)
        self.timeout, self.lossy = whole.timeout, whole.lossy
        self.call, self.request = whole.call, whole.request

    @property
    def device_rank(self) -> int:
        return self.whole.device_rank

    @property
    def ended(self) -> str | None:
        return self.whole.ended

    @property
    def stats(self) -> Stats:
        return self.whole.stats

    @property
    def peer_stats(self) -> dict[int, Stats]:
        stats = self.whole.peer_stats
        return {n: stats[rank] for n, rank in enumerate(self.members) if n != self.rank}

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
        number = {rank: n for n, rank in enumerate(self.members)}
        views = self.whole.receive(
            {self.members[n]: size for n, size in sizes.items()},
            block=block,
            plan=plan,
            timeout=timeout,
            partial=partial,
        )
        return {number[rank]: view for rank, view in views.items()}

    def check_cancelled(self) -> None:
        self.whole.check_cancelled()

    def interrupt(self, reason: str, call: int) -> None:
        self.whole.interrupt(reason, call)

    def flush(self) -> None:
        self.whole.flush()

    def close(self) -> None:
        self.whole.close()

    def abort(self, error: BaseException) -> None:
        self.whole.abort(error)
