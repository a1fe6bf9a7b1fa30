"""Who holds which tokens, and who may see them.

A sequence of `tokens` tokens is cut into `world_size` contiguous shards, one a rank. Visibility is
whole shards: a decoder's rank sees the shards before its own, an encoder's rank sees all others. So
attention over remote tokens never needs a causal mask, and only ranks that can see a shard receive
its codes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Plan:
    """The cut of one call.

    Attributes:
        bounds: `world_size + 1` token indices; rank n holds tokens `bounds[n]` to `bounds[n + 1]`.
        causal: True for decoders. False for encoders, where every rank sees every shard.
        copies: leading tokens of the sequence that every rank computes itself, in front of its
            shard: seen on that rank only, never sent, and not counted in `tokens`. An encoder's
            class token; a decoder's first tokens, where its codebook asks for that.
    """

    bounds: tuple[int, ...]
    causal: bool
    copies: int = 0

    @classmethod
    def make(
        cls,
        tokens: int,
        world_size: int,
        *,
        causal: bool,
        copies: int = 0,
        weights: Sequence[float] | None = None,
    ) -> Plan:
        """Cuts `tokens` in proportion to `weights` (None: equal), at least one token a rank."""
        if world_size < 1:
            raise ValueError(f"world_size: expected at least 1, got {world_size}")
        if tokens < world_size:
            raise ValueError(
                f"tokens: expected at least one for each of the {world_size} ranks, got {tokens}; "
                "give a longer input or fewer ranks"
            )
        share = [1.0] * world_size if weights is None else [float(w) for w in weights]
        if len(share) != world_size or not all(0 < w < float("inf") for w in share):
            raise ValueError(
                f"weights: expected {world_size} positive numbers, one for each rank, got {share}"
            )
        bounds, reached = [0], 0.0
        for n, weight in enumerate(share):
            reached += weight / sum(share)
            latest = tokens - (world_size - 1 - n)  # leaves a token for every rank after this one
            bounds.append(min(max(round(tokens * reached), bounds[-1] + 1), latest))
        return cls(tuple(bounds), causal, copies)

    @property
    def tokens(self) -> int:
        return self.bounds[-1]

    @property
    def world_size(self) -> int:
        return len(self.bounds) - 1

    def shard(self, rank: int) -> slice:
        """The tokens of `rank`, as a slice of the sequence, the copies in front included."""
        return slice(self.bounds[rank] + self.copies, self.bounds[rank + 1] + self.copies)

    def size(self, rank: int) -> int:
        """How many tokens `rank` holds, copies not counted."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def sources(self, rank: int) -> tuple[int, ...]:
        """The ranks whose tokens the tokens of `rank` see, in the order of the sequence."""
        last = rank if self.causal else self.world_size
        return tuple(n for n in range(last) if n != rank)

    def receivers(self, rank: int) -> tuple[int, ...]:
        """The ranks that see the tokens of `rank`."""
        return tuple(n for n in range(self.world_size) if rank in self.sources(n))

    @property
    def owner(self) -> int:
        """The rank that holds the sequence's last token, or rank 0 of an encoder."""
        return self.world_size - 1 if self.causal else 0

    def tag(self, inputs: Iterable[bytes | memoryview] = ()) -> int:
        """32 bits that name this cut and the inputs it is of; every frame carries them.

        Ranks that were given other tokens find out at the first frame.
        """
        told = zlib.crc32(repr((self.bounds, self.causal, self.copies)).encode())
        for content in inputs:
            told = zlib.crc32(content, told)
        return told


def balanced_weights(
    tokens: int,
    world_size: int,
    *,
    causal: bool,
    linear: float,
    attention: float,
    code: float,
    receive: float = 0.0,
) -> tuple[float, ...]:
    """Shares of the tokens with which all ranks of equal speed finish a block together.

    Args:
        linear: FLOPs of one token's projections and MLP.
        attention: FLOPs of one query over one key.
        code: FLOPs of coding one token; the last rank of a decoder codes nothing.
        receive: FLOPs of one remote token heard, before attention reads it.

    A decoder's later ranks see more keys and so take fewer tokens; an encoder's take equal shares.
    """
    if not causal or world_size == 1:
        return (1.0,) * world_size

    def reach(budget: float) -> list[float]:
        """The bounds when every rank spends `budget`: solves for each shard's size in turn."""
        bounds = [0.0]
        for n in range(world_size):
            start, a = bounds[-1], attention / 2
            b = linear + attention * start + (code if n < world_size - 1 else 0.0)
            left = max(0.0, budget - receive * start)
            # a·s² + b·s = left; the causal half of the local square is a·s²
            bounds.append(start + 2 * left / (b + (b * b + 4 * a * left) ** 0.5))
        return bounds

    low, high = 0.0, tokens * (linear + code + receive + attention * tokens)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reach(middle)[-1] < tokens else (low, middle)
    bounds = reach(high)
    return tuple(after - before for before, after in pairwise(bounds))
