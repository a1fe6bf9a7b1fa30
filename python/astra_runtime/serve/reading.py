"""A prompt that one rank reads by itself, while others, and its own answers, go on.

The pass over a prompt stops between two blocks when answers wait for their tokens: these are drawn
by a pass of their own in there. So a prompt's products have all of its rows, and a step the few of
the answers.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..engine_parts import EngineParts
from ..sessions.cache import KeyValues
from .batch import Cache, read
from .prompt import Prompt

# Of a prompt in one pass. The fewer, the more often weights are read; the more, the longer a block
# takes, and the more of a round is left over where answers wait.
MOST_ROWS = 1024
MOST_ROWS_BESIDE = 512
RECENT_STEPS = 4  # that say how long the next one takes
ADDED = 0.3  # of a step of one answer, by each further one: most of a step is reading the weights


class Dropped(Exception):
    """Nobody wants the answers to the prompt any more that this rank is reading."""


@dataclass(eq=False)
class Reading:
    """A prompt that this rank reads by itself.

    Attributes:
        wanted: which of its answers it then gives.
        seconds: of computing so far.
    """

    prompt: Prompt
    cache: Cache
    wanted: set[int]
    seconds: float = 0.0

    @classmethod
    def of(cls, prompt: Prompt, rank: int, blocks: int) -> Reading:
        return cls(prompt, Cache(KeyValues(blocks)), set(prompt.indices(rank)))

    def read(
        self, engine: EngineParts, most_rows: Callable[[], int], between: Callable[[int], None]
    ) -> None:
        """Reads all of it, in passes that are about as long as each other.

        Args:
            most_rows: how many tokens the next pass may have.
            between: called before each block of each pass.
        """
        ids = self.prompt.ids
        while rest := len(ids) - self.cache.length:
            start, passes = self.cache.length, math.ceil(rest / most_rows())
            new = torch.tensor([list(ids[start : start + math.ceil(rest / passes)])])
            with torch.no_grad():
                read(engine, [self.cache], [new.to(engine.adapter.device)], between)


class Pace:
    """When a rank that computes has to look after the answers that wait, and the other ranks.

    Args:
        seconds: of a round.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = self._since = 0.0
        self._block = 0.0  # seconds of the last block of a prompt
        self._steps: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)  # answers, seconds
        self._is_new = True  # no block was begun in this round

    def begin(self, in_pass: bool = False) -> None:
        """A round begins; `in_pass`: with the next block of a prompt."""
        self.go_on()
        self._until = self._since + self._seconds
        self._is_new = not in_pass

    def go_on(self) -> None:
        """A prompt is read from now on."""
        self._since = time.perf_counter()

    def stepped(self, answers: int, seconds: float) -> None:
        """A token of each of so many answers was drawn."""
        if answers:
            self._steps.append((answers, seconds))

    def step_seconds(self, answers: int) -> float:
        """What the next step takes at most, with so many answers: as long as the slowest of the
        last ones would with as many."""
        if not answers:
            return 0.0
        steps = (seconds * _share(answers) / _share(count) for count, seconds in self._steps)
        return max(steps, default=self._seconds / 3)

    def passed(self, block: int, answers: int) -> tuple[float, bool]:
        """Before a block of a prompt, or behind its last one: seconds since the last time, and
        whether there is no time for one more before the next step. A round has one at least."""
        now = time.perf_counter()
        taken, self._since = now - self._since, now
        if block and not self._is_new:
            self._block = taken
        due = not self._is_new and now + self._block + self.step_seconds(answers) > self._until
        self._is_new = False
        return taken, due

    def has_time(self, answers: int) -> bool:
        """Whether the round is long enough for one more step."""
        return time.perf_counter() + self.step_seconds(answers) <= self._until


def _share(answers: int) -> float:
    """What a step of so many answers takes, over one of one."""
    return 1 + ADDED * (answers - 1)
