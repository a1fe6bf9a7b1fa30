"""Degraded answers: whose tokens an answer lacks, and how ranks report it.

With `on_missing="degrade"` a rank leaves a peer out of a block's softmax, or attends to its tokens
as a codec predicts them, rather than wait for it any longer. What it computes and sends from then
on is shaped by that, so it says so: every frame of codes ends in the ranks that its sender has left
out since its last frame, every answer in all that its sender knows of. A rank is a bit; see
docs/wire.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real

from .errors import WireError
from .transport import Mesh


class Missing:
    """What one call lacks, as far as this rank knows.

    Args:
        world_size: N.
        blocks: L. Block L stands for the answer itself: a class token that did not come.
    """

    def __init__(self, world_size: int, blocks: int) -> None:
        self.world_size = world_size
        self.width = -(-world_size // 8)  # bytes of one block's ranks, behind a frame of codes
        self.all_width = self.width * (blocks + 1)  # bytes of all blocks' ranks, behind an answer
        self._ranks = [0] * (blocks + 1)  # by block, a bit a rank
        self._unreported = 0

    @property
    def answer(self) -> int:
        """The number that stands for the answer among the blocks."""
        return len(self._ranks) - 1

    def leave_out(self, block: int, ranks: Iterable[int]) -> None:
        """This rank goes on without (all of) the tokens of `ranks`."""
        bits = sum(1 << rank for rank in set(ranks))
        self._ranks[block] |= bits
        self._unreported |= bits

    def write_recent(self, out: memoryview) -> None:
        """Writes whom this rank has left out since it last wrote that, `width` bytes."""
        out[:] = self._unreported.to_bytes(self.width, "little")
        self._unreported = 0

    def read_recent(self, block: int, data: memoryview, source: int) -> None:
        """What `source` wrote behind its codes of `block`, which the block before has shaped."""
        self._ranks[max(block - 1, 0)] |= self._bits(data, source)

    def write_all(self, out: memoryview) -> None:
        """Writes all that this rank knows of, `all_width` bytes."""
        out[:] = b"".join(bits.to_bytes(self.width, "little") for bits in self._ranks)

    def read_all(self, data: memoryview, source: int) -> None:
        """What `source` wrote behind its answer."""
        for block in range(len(self._ranks)):
            start = block * self.width
            self._ranks[block] |= self._bits(data[start : start + self.width], source)

    def _bits(self, data: memoryview, source: int) -> int:
        bits = int.from_bytes(data, "little")
        if bits >> self.world_size:
            raise WireError(
                "missing rank", f"below {self.world_size}", bits.bit_length() - 1, source
            )
        return bits

    def by_rank(self) -> dict[int, list[int]]:
        """The blocks in which each rank's tokens are missing; ranks that never are have none."""
        blocks: dict[int, list[int]] = {}
        for block, bits in enumerate(self._ranks):
            for rank in range(self.world_size):
                if bits >> rank & 1:
                    blocks.setdefault(rank, []).append(block)
        return dict(sorted(blocks.items()))


def waiting_limits(
    on_missing: str, deadline_ms: float | None, mesh: Mesh, blocks: int
) -> tuple[float | None, float]:
    """Seconds that a block's exchange may take (None: as long as the mesh waits), and an answer."""
    deadline = None if deadline_ms is None else deadline_ms / 1000
    longest = mesh.timeout if deadline is None else deadline
    # whoever waits for an answer must not give up before the rank that makes it has done so
    patience = max(mesh.timeout, 2 * longest)
    if on_missing == "degrade":
        patience += (blocks + 1) * longest  # it may have waited in each block, and for pictures
    return deadline, patience


def check_deadlines(on_missing: str, deadline_ms: float | None, mesh: Mesh) -> None:
    if on_missing not in ("raise", "degrade"):
        raise ValueError(f"on_missing: expected 'raise' or 'degrade', got {on_missing!r}")
    is_number = isinstance(deadline_ms, Real) and not isinstance(deadline_ms, bool)
    if deadline_ms is not None and not is_number:
        raise TypeError(f"deadline_ms: expected milliseconds, above 0, got {deadline_ms!r}")
    if deadline_ms is not None and not 0 < deadline_ms <= 1e9:
        raise ValueError(f"deadline_ms: expected above 0, at most 1e9, got {deadline_ms}")
    if on_missing == "degrade" and deadline_ms is None:
        raise ValueError("deadline_ms: expected a number with on_missing='degrade', got None")
    if on_missing == "degrade" and not mesh.partial:
        raise ValueError(
            "on_missing: expected 'raise' with this transport, which leaves nobody out"
        )
    if on_missing == "raise" and mesh.lossy:
        raise ValueError(
            "on_missing: expected 'degrade' with this transport, which loses frames, got 'raise'"
        )
