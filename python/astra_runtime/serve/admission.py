"""Who is next: first come, first served, as far as memory goes on the rank that will answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from .service import QueueFull, RequestRefused
from .work import Work

MOST_AHEAD = 2  # answers that a rank may have more than the idlest, if it knows the beginning
MAX_ANSWERS = 32  # that one rank decodes at once


class Admission:
    """The bounded queue, and what each rank has taken on.

    Args:
        max_queue: requests that may wait.

    Attributes:
        budget: bytes for keys and values, of each rank.
    """

    def __init__(self, world_size: int, max_queue: int) -> None:
        self.world_size, self.max_queue = world_size, max_queue
        self.budget = dict.fromkeys(range(world_size), 0)
        self._queue: deque[Work] = deque()
        self._last_owner = world_size - 1
        self.running: list[Work] = []
        self._seconds = 1.0  # that a request takes, for those who have to try again

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, work: Work) -> None:
        """Raises QueueFull, and RequestRefused where no rank could ever hold its answers."""
        most = max(self.budget.values())
        if most and work.bytes > most:
            raise RequestRefused(
                "max_tokens",
                f"the answers would take {work.bytes >> 20} MiB of keys and values, and a device "
                f"has room for {most >> 20}: ask for fewer tokens or fewer answers",
            )
        if len(self._queue) >= self.max_queue:
            raise QueueFull(len(self._queue), max(1.0, self._seconds))
        self._queue.append(work)

    def next(self) -> Work | None:
        """The request that waits longest, if a rank has room for its answers; it has an owner."""
        if not self._queue:
            return None
        work = self._queue[0]
        owner = self._owner_for(work)
        if owner is None:
            return None
        work.owner = owner
        return work

    def admit(self, work: Work) -> None:
        """`next` begins to run."""
        self._queue.popleft()
        self._last_owner = work.owner
        self.running.append(work)

    def finish(self, work: Work, seconds: float) -> None:
        """It runs no more."""
        self.running.remove(work)
        self._seconds += 0.2 * (seconds - self._seconds)

    def remove(self, work: Work) -> None:
        """It waits no more."""
        self._queue.remove(work)

    def waiting(self) -> Iterator[Work]:
        return iter(tuple(self._queue))

    def answers_of(self, rank: int) -> int:
        return sum(work.num_answers(rank) for work in self.running)

    def has_room(self, rank: int, size: int, answers: int) -> bool:
        """Whether `rank` can take so many more answers, of `size` bytes together."""
        taken = sum(work.answer_bytes * work.num_answers(rank) for work in self.running)
        own = self.answers_of(rank)
        return taken + size <= self.budget[rank] and (not own or own + answers <= MAX_ANSWERS)

    def may_own(self, work: Work, rank: int) -> bool:
        """Whether `rank` has room for its answers, and not many more than the chosen owner has."""
        ahead = self.answers_of(rank) - self.answers_of(work.owner)
        return self.has_room(rank, work.bytes, work.request.n) and ahead < MOST_AHEAD

    def _owner_for(self, work: Work) -> int | None:
        """The rank with the fewest answers of those with room. Of several the one behind which the
        rank with most answers follows, and so stands first where all read the prompt: that one can
        read less of it than the others (`segments`). Where all have equally many, the next in turn.
        """
        ranks, size, n = range(self.world_size), self.world_size, work.request.n
        free = [rank for rank in ranks if self.has_room(rank, work.bytes, n)]
        counts = [self.answers_of(rank) for rank in ranks]
        first = self._last_owner + 1
        if max(counts) > min(counts):
            first = counts.index(max(counts)) - 1
        key = lambda rank: (counts[rank], (rank - first) % size)  # noqa: E731
        return min(free, key=key, default=None)
