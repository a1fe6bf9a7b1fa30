"""What prompts and answers cost, from what was seen: for decisions about which ranks do what."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..costs import EXACT_TOKENS
from ..engine import Engine
from .segments import Segments

NEWEST = 0.3  # the weight of the newest figure
FORGOTTEN = 0.03  # of what reading by one rank was seen to cost, whenever something else is seen
MOST_END = 0.25  # of a prompt, before its first block or behind the last one
UNKNOWN_CHECKS = 3  # segments of a prompt of unknown cost that nobody else waits for
# From a token of an answer to its next one, while a prompt is read: half a second at most with what
# it takes to report and to hand them out.
ROUND_SECONDS = 0.40
LEAST_SEGMENT = 0.1  # seconds of a prompt between two tokens of the others, however long these take


class PromptCosts:
    """Learns seconds a token of a rank by itself, and what reading together adds to that.

    Reading together takes as long as the largest shard would by itself, and an exchange whose
    length hardly depends on the prompt. While others wait for tokens, whoever reads pauses for
    these every `ROUND_SECONDS`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.blocks = len(engine.adapter.blocks)
        self.token: float | None = None  # seconds of one token, on a rank by itself
        self.by_one: float | None = None  # the same, as prompts were read by one of several ranks
        self.exchange: float | None = None  # seconds that reading together adds
        # Shares of what reading together takes: before the first block (the ranks get the job, cut
        # and embed it), and behind the last one (the head, what is kept, who is late).
        self.begin = self.end = 0.0
        self.pause: float | None = None  # seconds of a pause

    @property
    def tokens_per_s(self) -> float | None:
        """At which a rank reads a prompt by itself."""
        return None if not self.token else 1 / self.token

    def record_alone(self, tokens: int, seconds: float) -> None:
        """A rank has read a prompt by itself."""
        if self.token is None or tokens > EXACT_TOKENS:  # of a few tokens each costs more
            self.token = _mixed(self.token, seconds / tokens)

    def record_by_one(self, tokens: int, seconds: float) -> None:
        """A rank has read a prompt by itself while others did something else."""
        if self.token is None:
            self.token = seconds / tokens
        if tokens > EXACT_TOKENS:
            self.by_one = _mixed(self.by_one, seconds / tokens)

    def record_together(self, tokens: int, seconds: float, busy: float | None = None) -> None:
        """All ranks have read a prompt, pauses not counted.

        busy: seconds for which the busiest rank computed; None: not known.
        """
        if busy is not None and tokens > EXACT_TOKENS:
            self.token = _mixed(self.token, busy / self._shard(tokens))
        elif self.token is None:
            self.token = seconds / self._shard(tokens)
        rest = max(0.0, seconds - self.token * self._shard(tokens))
        self.exchange = _mixed(self.exchange, rest)
        if self.by_one is not None:  # what once seemed slow is tried again some day
            self.by_one += FORGOTTEN * (self.token - self.by_one)

    def record_uneven(self, tokens: int, busy: float, beside: Sequence[float]) -> None:
        """The same where the ranks had unequal shares: see `beside`."""
        if tokens > EXACT_TOKENS:
            most = self._shard(tokens) + sum(beside) / len(beside) - min(beside)
            self.token = _mixed(self.token, busy / most)

    def record_ends(self, begin: float, end: float) -> None:
        """All ranks have read a prompt in equal shares of work: which shares of the seconds were
        before its first block, and behind the last one."""
        begin, end = (min(max(0.0, share), MOST_END) for share in (begin, end))
        self.begin = _mixed(self.begin or None, begin)
        self.end = _mixed(self.end or None, end)

    def record_pause(self, seconds: float) -> None:
        """All ranks have paused while they read a prompt, and decoded a token of all else."""
        self.pause = _mixed(self.pause, seconds)

    def together_is_faster(self, tokens: int) -> bool:
        """Whether all ranks should read a prompt of so many tokens."""
        if self._engine.mesh.world_size == 1 or tokens <= EXACT_TOKENS:
            return False
        if self.token is None or self.exchange is None:
            return True
        return self.together(tokens) < self.alone(tokens)

    def apart_is_faster(
        self, tokens: int, waiting: int, others: bool = False, rest: float | None = None
    ) -> bool:
        """Whether of so many prompts that wait or are read by one rank, each should be read by one.

        Where there are more of them than ranks, what counts is how many are read in a second; else
        how soon their first tokens come on average, or that of a further one where ranks read some.
        To read one together, ranks that are free would wait for the others.

        Args:
            others: whether answers wait for tokens meanwhile.
            rest: seconds until no rank reads a prompt by itself any more; None: none does.
        """
        ranks = self._engine.mesh.world_size
        if ranks == 1 or waiting < 2 or self.token is None:
            return False
        alone, together = self.alone(tokens, others), self.together(tokens, others)
        if waiting > ranks:
            return alone < ranks * together + (rest or 0.0)
        if rest is not None:
            return alone < rest + together
        return alone < together * (waiting + 1) / 2

    def alone(self, tokens: int, others: bool = False) -> float:
        """Seconds that one rank needs for a prompt; 0 where nothing is known.

        others: whether it pauses for answers that wait for tokens.
        """
        seconds = (self.by_one or self.token or 0.0) * tokens
        pause = (self.pause or 0.0) if others else 0.0
        return seconds + int(seconds / segment_seconds(pause)) * pause

    def together(self, tokens: int, others: bool = False) -> float:
        """Seconds that all ranks need for a prompt; 0 where nothing is known.

        others: whether they pause for answers that wait for tokens.
        """
        seconds = (self.token or 0.0) * self._shard(tokens) + (self.exchange or 0.0)
        return seconds + len(self.pauses(tokens)) * (self.pause or 0.0) if others else seconds

    def pauses(self, tokens: int, steps: Sequence[float] | None = None) -> list[int]:
        """The blocks before which all ranks pause, so that others do not wait for their tokens.

        steps: seconds of a step of a rank's answers, by rank in the order of the sequence; None:
            on every rank as many as a pause took so far.
        """
        if self.token is None:
            return list(range(1, self.blocks))
        seconds = self.together(tokens)
        pauses: list[int] = []
        segments, most = self._segments(seconds, steps), self._most_segments(seconds, LEAST_SEGMENT)
        for count in range(min(most, max(1, int(seconds / ROUND_SECONDS))), most + 1):
            pauses, longest = segments.cut(count)
            if longest <= ROUND_SECONDS:
                break
        return pauses

    def beside(self, tokens: int, steps: Sequence[float], pauses: int) -> list[int]:
        """By rank in the order of the sequence, what it decodes in so many pauses more than others
        do, in tokens of such a prompt: it reads so many fewer than these."""
        if self.token is None:
            return [0] * len(steps)
        segments = self._segments(self.together(tokens), steps)
        return [round(seconds / self.token) for seconds in segments.beside(pauses)]

    def _segments(self, seconds: float, steps: Sequence[float] | None) -> Segments:
        if steps is None:
            steps = (ROUND_SECONDS / 3 if self.pause is None else self.pause,)
        return Segments(self.blocks, seconds, steps, self.begin, self.end)

    def checks(self, tokens: int, seconds: float) -> list[int]:
        """The same where nobody waits for tokens: in so many seconds each rank has shown that it
        goes on."""
        count = UNKNOWN_CHECKS
        if self.token is not None:
            count = self._most_segments(self.together(tokens), seconds)
        return sorted({self.blocks * i // count for i in range(1, count)} - {0})

    def _most_segments(self, whole: float, seconds: float) -> int:
        """Of so many seconds that all of the prompt takes, a segment each of `seconds`."""
        return max(1, min(math.ceil(whole / seconds), self.blocks))

    def _shard(self, tokens: int) -> int:
        """The most tokens that a rank computes of a prompt; one rank reads a short one."""
        if tokens <= EXACT_TOKENS:
            return tokens
        plan = self._engine.plan(tokens)
        return max(plan.size(n) + plan.num_leading(n) for n in range(plan.world_size))


class AnswerCosts:
    """Learns what it takes to decode several answers to one prompt on one rank, or on several.

    All ranks step together, so a step takes as long as that of the rank with most answers.

    Args:
        prompts: what reading costs.
    """

    def __init__(self, prompts: PromptCosts) -> None:
        self._prompts = prompts
        self._steps: dict[int, float] = {}  # seconds of a step, by answers
        self._shared: float | None = None  # seconds a token of a prompt that was shared
        self._tokens: float | None = None  # of an answer

    def record_step(self, answers: int, seconds: float) -> None:
        """A rank has decoded a token of each of so many answers."""
        self._steps[answers] = _mixed(self._steps.get(answers), seconds)

    def record_shared(self, tokens: int, seconds: float) -> None:
        """Other ranks than its owner can go on with a prompt of so many tokens."""
        self._shared = _mixed(self._shared, seconds / tokens)

    def record_answer(self, tokens: int) -> None:
        """An answer has so many tokens."""
        self._tokens = _mixed(self._tokens, tokens)

    def step(self, answers: int) -> float | None:
        """Seconds that a step of so many answers takes; None: nothing is known."""
        if not self._steps or not answers:
            return None
        known = min(self._steps, key=lambda count: abs(count - answers))
        return max(0.0, self._steps[known] + (answers - known) * (self.added() or 0.0))

    def added(self) -> float | None:
        """Seconds that one more answer adds to a step; None: nothing is known.

        At least those of a token of a prompt, which shares a pass with many others.
        """
        least, sizes = self._prompts.token, sorted(self._steps)
        if len(sizes) < 2:
            return least
        mean = sum(sizes) / len(sizes)
        spread = sum((size - mean) ** 2 for size in sizes)
        slope = sum((size - mean) * self._steps[size] for size in sizes) / spread
        return max(slope, least or 0.0)

    def sharing(self, tokens: int) -> float | None:
        """Seconds until other ranks can go on with a prompt that all have read; None: not known.

        Before it was measured: those of the exchange while a prompt is read, as about as much has
        not been sent yet.
        """
        return self._prompts.exchange if self._shared is None else self._shared * tokens

    def is_sooner(self, fewer: int, most_tokens: int, seconds: float) -> bool:
        """Whether answers of at most so many tokens, the first of them drawn, are whole sooner
        where steps have `fewer` answers, after `seconds` in which nobody steps."""
        tokens = most_tokens if self._tokens is None else min(most_tokens, self._tokens)
        if fewer < 1 or tokens <= 1:
            return False
        added = self.added()
        return added is None or fewer * added * (tokens - 1) > seconds


def segment_seconds(pause: float) -> float:
    """Of a prompt, between two pauses of so many seconds for the others' tokens."""
    return max(LEAST_SEGMENT, ROUND_SECONDS - pause)


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + NEWEST * (new - old)
