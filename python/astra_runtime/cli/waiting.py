"""Saying for whom a rank waits while the ranks connect."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..console import SILENCE, say


class Waiting:
    """An `on_wait` of `ConnectOptions`: a line for each change, and one after each silence.

    Args:
        silence: seconds; infinite for a worker that stands by for days.
        longest: what the silence grows to, line by line, while nothing changes; None: it stays.
    """

    def __init__(
        self,
        rank: int,
        peers: Sequence[str],
        silence: float = SILENCE,
        longest: float | None = None,
    ) -> None:
        self.rank, self.peers, self.silence = rank, peers, silence
        self.longest = silence if longest is None else longest
        self.begin()

    def begin(self) -> None:
        """A wait begins now."""
        self.begun = self.last_line = time.monotonic()
        self.missing: tuple[int, ...] = ()
        self._pause = self.silence

    def __call__(self, missing: tuple[int, ...]) -> None:
        now = time.monotonic()
        same = missing == self.missing
        if same and now - self.last_line < self._pause:
            return
        self._pause = min(2 * self._pause, self.longest) if same else self.silence
        self.missing, self.last_line = missing, now
        ranks = ", ".join(f"rank {rank} at {self.peers[rank]}" for rank in missing)
        say(f"rank {self.rank} waits for {ranks} … {now - self.begun:.0f} s")
