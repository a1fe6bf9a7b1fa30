"""Whether a prompt is read faster by all ranks together or by one alone, from what was seen."""

from __future__ import annotations

from ..costs import EXACT_TOKENS
from ..engine import Engine

NEWEST = 0.3  # the weight of the newest figure
UNKNOWN_CHECKS = 3  # segments of a prompt of unknown cost that nobody else waits for
SEGMENT_SECONDS = 0.35  # that a prompt may be read before the others get a token


class PromptCosts:
    """Learns seconds a token of a rank by itself, and what reading together adds to that.

    Reading together takes as long as the largest shard would by itself, and an exchange whose
    length hardly depends on the prompt.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._blocks = len(engine.adapter.blocks)
        self.token: float | None = None  # seconds of one token, on a rank by itself
        self.exchange: float | None = None  # seconds that reading together adds

    @property
    def tokens_per_s(self) -> float | None:
        """At which a rank reads a prompt by itself."""
        return None if not self.token else 1 / self.token

    def heard_alone(self, tokens: int, seconds: float) -> None:
        """A rank has read a prompt by itself."""
        if self.token is None or tokens > EXACT_TOKENS:  # of a few tokens each costs more
            self.token = _mixed(self.token, seconds / tokens)

    def heard_together(self, tokens: int, seconds: float, busy: float | None = None) -> None:
        """All ranks have read a prompt, pauses not counted.

        busy: seconds for which the busiest rank computed; None: not known.
        """
        if busy is not None and tokens > EXACT_TOKENS:
            self.token = _mixed(self.token, busy / self._shard(tokens))
        elif self.token is None:
            self.token = seconds / self._shard(tokens)
        rest = max(0.0, seconds - self.token * self._shard(tokens))
        self.exchange = _mixed(self.exchange, rest)

    def together_is_faster(self, tokens: int) -> bool:
        """Whether all ranks should read a prompt of so many tokens."""
        if self._engine.mesh.world_size == 1 or tokens <= EXACT_TOKENS:
            return False
        if self.token is None or self.exchange is None:
            return True
        return self.together(tokens) < self.token * tokens

    def apart_is_faster(self, tokens: int, waiting: int) -> bool:
        """Whether of so many prompts that wait, the first tokens come sooner on average where each
        rank reads some of them by itself than where all ranks read one after the other."""
        ranks = self._engine.mesh.world_size
        if ranks == 1 or waiting < 2 or self.token is None:
            return False
        turns = sum(1 + i // ranks for i in range(waiting)) / waiting
        return turns * self.token * tokens < self.together(tokens) * (waiting + 1) / 2

    def together(self, tokens: int) -> float:
        """Seconds that all ranks need for a prompt; 0 where nothing is known."""
        return (self.token or 0.0) * self._shard(tokens) + (self.exchange or 0.0)

    def pauses(self, tokens: int) -> list[int]:
        """The blocks before which all ranks pause, so that others do not wait for their tokens."""
        return self._cuts(tokens, SEGMENT_SECONDS, self._blocks)

    def checks(self, tokens: int, seconds: float) -> list[int]:
        """The same where nobody waits for tokens: in so many seconds each rank has shown that it
        goes on."""
        return self._cuts(tokens, seconds, UNKNOWN_CHECKS)

    def _cuts(self, tokens: int, seconds: float, unknown: int) -> list[int]:
        """Cuts a prompt's blocks into segments of `seconds`; `unknown`: how many, where nothing is
        known of its costs."""
        segments = 1 + int(self.together(tokens) / seconds)
        if self.token is None:
            segments = unknown
        segments = min(segments, self._blocks)
        return sorted({self._blocks * i // segments for i in range(1, segments)} - {0})

    def _shard(self, tokens: int) -> int:
        """The most tokens that a rank computes of a prompt; one rank reads a short one."""
        if tokens <= EXACT_TOKENS:
            return tokens
        plan = self._engine.plan(tokens)
        return max(plan.size(n) + plan.num_leading(n) for n in range(plan.world_size))


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else old + NEWEST * (new - old)
