"""A prompt that all ranks read together, cut into segments of equal time: between two of them the
ranks pause, and decode a token of every answer.

In a pause a rank has as many answers to go on with as it owns, and may have none. Then those with
fewer read more of the prompt: the ranks reach a pause one after the other, and leave it together,
so nobody waits. A decoder's rank waits for codes of those before it in every block, so it cannot
make up in a segment for what it decodes more than they do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

ROUNDING = 1e-9  # of blocks
HALVINGS = 16  # of the span in which the shortest segments are sought


class Segments:
    """The segments of one prompt, however many.

    Args:
        blocks: of the model.
        seconds: that all ranks need for the prompt, with nothing beside it.
        steps: seconds of a step of a rank's answers, by rank in the order of the sequence.
        begin, end: which shares of `seconds` are before the first block, and behind the last one.
    """

    def __init__(
        self,
        blocks: int,
        seconds: float,
        steps: Sequence[float],
        begin: float = 0.0,
        end: float = 0.0,
    ) -> None:
        self._blocks, self._seconds, self._steps = blocks, seconds, tuple(steps)
        self._begin, self._end = begin * seconds, end * seconds
        least, self._more = steps[0], []
        for step in steps:
            least = min(least, step)
            self._more.append(least)
        self._more = [step - least for step in self._more]

    def beside(self, pauses: int) -> list[float]:
        """By rank, the seconds in so many pauses in which it decodes more than others: it reads
        less of the prompt."""
        return [min(pauses * more, self._seconds) for more in self._more]

    def cut(self, count: int) -> tuple[list[int], float]:
        """The blocks before which the ranks pause, in `count` segments of about equal time; and
        seconds of the longest of them with the step behind it."""
        beside = self.beside(count - 1)
        whole = self._seconds - self._begin - self._end + sum(beside) / len(beside)
        of_block = [(whole - less) / self._blocks for less in beside]

        def lengths(limit: float) -> list[int]:
            """Blocks of each segment, where none takes longer."""
            found = []
            for n in range(count):
                left = limit - (self._begin if n == 0 else 0.0)
                steps = self._steps
                if n == count - 1:  # who has read the prompt waits for the others before the step
                    left -= self._end + max(steps)
                    steps = (0.0,) * len(steps)
                pairs = zip(steps, of_block, strict=True)
                found.append(min(int((left - step) / one + ROUNDING) for step, one in pairs))
            return found

        low = 0.0
        high = self._begin + self._end + max(self._steps) + self._blocks * max(of_block)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            some = lengths(middle)
            is_enough = min(some) >= 1 and sum(some) >= self._blocks
            low, high = (low, middle) if is_enough else (middle, high)
        found = lengths(high)
        while sum(found) > self._blocks:  # the last one first: how late others are is least known
            found[max(range(count), key=lambda n: (found[n], n))] -= 1
        return list(accumulate(found))[:-1], high


class Course:
    """How all ranks read a prompt, and what time it takes, as one of them sees it.

    Args:
        blocks: of the model.
        pauses: the blocks before which all ranks pause.
        beside: by rank, what it decodes in the pauses more than others do, in tokens of the prompt:
            it reads so many fewer than these. Empty: all read equal shares of the work.

    Attributes:
        paused: seconds of all pauses so far.
        stepped: those of them in which the rank with most answers has decoded.
        seconds: that it has taken without them, once it was stopped.
    """

    def __init__(self, blocks: int, pauses: Sequence[int], beside: Sequence[int] = ()) -> None:
        self.blocks, self.pauses, self.beside = blocks, list(pauses), list(beside)
        self.paused = self.stepped = self.seconds = 0.0
        self._begun = self._first = self._last = 0.0

    @property
    def is_even(self) -> bool:
        return not any(self.beside)

    def begin(self) -> None:
        """The ranks have been told to read."""
        self._begun = time.perf_counter()

    @contextmanager
    def pausing(self, block: int) -> Iterator[None]:
        """What is done here before a block is a pause."""
        start = time.perf_counter()
        if block == 0:
            self._first = start
        yield
        now = time.perf_counter()
        self.paused += now - start
        self._last = now - self.paused

    def stop(self) -> None:
        """This rank has read it."""
        self.seconds = time.perf_counter() - self._begun - self.paused

    def ends(self) -> tuple[float, float]:
        """Which shares of the seconds were before the first block, and behind the last one."""
        if self.blocks < 2 or self.seconds <= 0:
            return 0.0, 0.0
        block = (self._last - self._first) / (self.blocks - 1)
        behind = self._begun + self.seconds - self._last - block
        return (self._first - self._begun) / self.seconds, behind / self.seconds
