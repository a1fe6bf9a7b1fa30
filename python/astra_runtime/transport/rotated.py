"""A mesh with its ranks numbered from another one on, so that any rank can hold the last tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from astra_runtime.errors import AstraError
from astra_runtime.transport.mesh import Mesh, Payload
from astra_runtime.transport.stats import Stats
from astra_runtime.wire import Frame


class RotatedMesh(Mesh):
    """A view of `mesh` in which its rank `first` is rank 0, the next one rank 1, and so on.

    The frames are the same; every rank of a call has to use the same view. Errors name ranks as
    `mesh` does.
    """

    def __init__(self, mesh: Mesh, first: int) -> None:
        self._mesh, self._first = mesh, first
        self.world_size = mesh.world_size
        self.rank = self._of_view(mesh.rank)
        self.partial, self.lossy, self.resumes = mesh.partial, mesh.lossy, mesh.resumes
        self.timeout, self.options = mesh.timeout, mesh.options
        self.call, self.request = mesh.call, mesh.request

    def _of_view(self, rank: int) -> int:
        return (rank - self._first) % self.world_size

    def original(self, rank: int) -> int:
        """The rank that this view's `rank` has in the mesh itself."""
        return (rank + self._first) % self.world_size

    @property
    def device_rank(self) -> int:
        return self._mesh.device_rank

    @property
    def ended(self) -> str | None:
        return self._mesh.ended

    @property
    def encrypted(self) -> bool:
        return self._mesh.encrypted

    @property
    def stats(self) -> Stats:
        return self._mesh.stats

    @property
    def peer_stats(self) -> dict[int, Stats]:
        return {self._of_view(rank): stats for rank, stats in self._mesh.peer_stats.items()}

    @property
    def missing_ranges(self) -> Mapping[int, Sequence[tuple[int, int]]]:
        ranges = self._mesh.missing_ranges
        return {self._of_view(rank): missing for rank, missing in ranges.items()}

    @property
    def lost(self) -> Mapping[int, AstraError]:
        return {self._of_view(rank): error for rank, error in self._mesh.lost.items()}

    def buffer(self, size: int) -> Frame:
        return self._mesh.buffer(size)

    def send(
        self, payload: Payload, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        ranks = [self.original(rank) for rank in to]
        self._mesh.send(payload, block=block, plan=plan, to=ranks, partial=partial)

    def receive(
        self,
        sizes: Mapping[int, int],
        *,
        block: int,
        plan: int,
        timeout: float | None = None,
        partial: bool = False,
    ) -> dict[int, memoryview]:
        asked = {self.original(rank): size for rank, size in sizes.items()}
        views = self._mesh.receive(asked, block=block, plan=plan, timeout=timeout, partial=partial)
        return {self._of_view(rank): view for rank, view in views.items()}

    def begin(self, request: int | None = None) -> None:
        self._mesh.begin(request)
        self.call, self.request = self._mesh.call, self._mesh.request

    def cancel(self, error: BaseException) -> None:
        self._mesh.cancel(error)

    def check_cancelled(self) -> None:
        self._mesh.check_cancelled()

    def interrupt(self, reason: str, call: int) -> None:
        self._mesh.interrupt(reason, call)

    def end_early(self) -> None:
        self._mesh.end_early()

    def flush(self) -> None:
        self._mesh.flush()

    def close(self) -> None:
        self._mesh.close()

    def abort(self, error: BaseException) -> None:
        self._mesh.abort(error)
