"""Who holds which tokens, and who may see them.

A sequence of `tokens` tokens is cut into `world_size` contiguous shards, one a rank. A decoder's
rank sees what lies before its own tokens, an encoder's rank sees all other shards. So attention
over remote tokens never needs a causal mask, and only ranks that can see a shard receive its codes.

A decoder's rank may also compute a *halo*: context that overlaps with the shard before, the last
tokens in front of its own (stencil codes say halo, or ghost cells). What a token needs most is what
stands right before it, and coarse codes cost most there. Halos are seen on that rank only. Nothing
of them is sent, and this rank does not read the codes that their own rank sends to others.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Of a shard, what may have fine codes: of four times the bits, they are as many at any number of
# ranks then. More of them would keep the link busy for longer than ranks of few tokens compute.
FINE_PART = 0.25


@dataclass(frozen=True)
class Plan:
    """The cut of one call.

    Attributes:
        bounds: `world_size + 1` token indices; rank n holds tokens `bounds[n]` to `bounds[n + 1]`.
        causal: True for decoders. False for encoders, where every rank sees every shard.
        copies: replicated tokens, the first of the sequence, which every rank computes itself in
            front of its shard: seen on that rank only, never sent, and not counted in `tokens`. An
            encoder's class token; a decoder's attention sinks, where its codebook asks for that.
        halo: of a decoder, how many tokens before its shard a rank computes, too; fewer where there
            are no more.

    Example:
        >>> plan = Plan.make(10, 2, causal=True, halo=1)
        >>> plan.bounds, plan.size(1), plan.num_leading(1)
        ((0, 5, 10), 5, 1)
        >>> plan.sources(1), plan.receivers(1), plan.num_received(1, 0)
        ((0,), (), 4)
    """

    bounds: tuple[int, ...]
    causal: bool
    copies: int = 0
    halo: int = 0

    @classmethod
    def make(
        cls,
        tokens: int,
        world_size: int,
        *,
        causal: bool,
        copies: int = 0,
        halo: int = 0,
        shard_weights: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
    ) -> Plan:
        """Cuts `tokens` in proportion to `shard_weights`, at least one token a rank.

        None: equal shards. `weights` is the older name of `shard_weights`.
        """
        if world_size < 1:
            raise ValueError(f"world_size: expected at least 1, got {world_size}")
        if tokens < world_size:
            raise ValueError(
                f"tokens: expected at least one for each of the {world_size} ranks, got {tokens}; "
                "give a longer input or fewer ranks"
            )
        given = weights if shard_weights is None else shard_weights
        shares = [1.0] * world_size if given is None else [float(w) for w in given]
        if len(shares) != world_size or not all(0 < w < float("inf") for w in shares):
            raise ValueError(
                f"weights: expected {world_size} positive numbers, one for each rank, got {shares}"
            )
        check_halo(halo, causal)
        if sum(shares) == float("inf"):
            shares = [weight / max(shares) for weight in shares]
        bounds, reached = [0], 0.0
        for n, weight in enumerate(shares):
            reached += weight / sum(shares)
            latest = tokens - (world_size - 1 - n)  # leaves a token for every rank after this one
            bounds.append(min(max(round(tokens * reached), bounds[-1] + 1), latest))
        return cls(tuple(bounds), causal, copies, halo)

    @property
    def tokens(self) -> int:
        """How many there are, replicated ones not counted."""
        return self.bounds[-1]

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return len(self.bounds) - 1

    def shard(self, rank: int) -> slice:
        """The tokens of `rank`, as a slice of the sequence with its replicated tokens."""
        return slice(self.bounds[rank] + self.copies, self.bounds[rank + 1] + self.copies)

    def size(self, rank: int) -> int:
        """How many tokens `rank` holds, replicated tokens not counted."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def num_leading(self, rank: int) -> int:
        """Tokens that `rank` computes in front of its shard: the replicated ones, and its halo."""
        return self.copies + min(self.halo, self.bounds[rank])

    def local_tokens(self, tensor: Tensor, rank: int) -> Tensor:
        """What `rank` computes of a sequence [B, copies + tokens, …]: replicated, halo, shard."""
        shard = self.shard(rank)
        start = shard.start - (self.num_leading(rank) - self.copies)
        return torch.cat([tensor[:, : self.copies], tensor[:, start : shard.stop]], 1)

    def without_halo(self, tensor: Tensor, rank: int) -> Tensor:
        """Of what `rank` computes, [B, L, …], the replicated tokens and its shard."""
        leading = self.num_leading(rank)
        if leading == self.copies:
            return tensor
        return torch.cat([tensor[:, : self.copies], tensor[:, leading:]], 1)

    def num_received(self, rank: int, source: int) -> int:
        """How many tokens of `source`, from its first on, `rank` knows from codes alone."""
        if source == rank or (self.causal and source > rank):
            return 0
        if not self.causal:
            return self.size(source)
        start = max(0, self.bounds[rank] - self.halo)
        return max(0, min(self.bounds[source + 1], start) - self.bounds[source])

    def num_sent(self, rank: int) -> int:
        """How many tokens of `rank`, from its first on, are sent: those that any rank receives.

        No rank receives more than a decoder's last one; an encoder's ranks all receive alike.
        """
        if self.causal:
            return self.num_received(self.world_size - 1, rank)
        return self.size(rank) if self.world_size > 1 else 0

    def fine_tokens(self, rank: int, most: int) -> slice:
        """Of the tokens that `rank` sends, the last ones that have fine codes for the next rank:
        `most`, or a `FINE_PART` of what that rank receives; as a slice.

        An encoder's tokens look both ways: none.
        """
        last = self.world_size - 1
        stop = self.num_received(rank + 1, rank) if self.causal and rank < last else 0
        return slice(stop - min(most, round(FINE_PART * stop)), stop)

    def sources(self, rank: int) -> tuple[int, ...]:
        """The ranks whose tokens the tokens of `rank` see, in the order of the sequence."""
        return tuple(n for n in range(self.world_size) if self.num_received(rank, n))

    def receivers(self, rank: int) -> tuple[int, ...]:
        """The ranks that see the tokens of `rank`, in the order in which they are sent to.

        The next rank first, and so on around: a decoder's next rank can go on the sooner, and an
        encoder's ranks send to one downlink each at a time.
        """
        ahead = ((rank + step) % self.world_size for step in range(1, self.world_size))
        return tuple(n for n in ahead if self.num_received(n, rank))

    def sent_slice(self, rank: int) -> slice:
        """The tokens of `rank` that are sent, as a slice of the sequence."""
        start = self.shard(rank).start
        return slice(start, start + self.num_sent(rank))

    def remote_tokens(self, tensor: Tensor, rank: int) -> Tensor:
        """Of a sequence [B, copies + tokens, …], what `rank` receives codes of: [B, N, …]."""
        starts = [(self.shard(n).start, self.num_received(rank, n)) for n in self.sources(rank)]
        return torch.cat(
            [tensor[:, :0], *(tensor[:, start : start + count] for start, count in starts)], 1
        )

    @property
    def owner(self) -> int:
        """The rank that holds the sequence's last token, or rank 0 of an encoder."""
        return self.world_size - 1 if self.causal else 0

    def tag(self, inputs: Iterable[bytes | memoryview] = ()) -> int:
        """32 bits that name this cut and the inputs it is of; every frame carries them.

        Ranks that were given other tokens find out at the first frame.
        """
        checksum = zlib.crc32(repr((self.bounds, self.causal, self.copies, self.halo)).encode())
        for content in inputs:
            checksum = zlib.crc32(content, checksum)
        return checksum

    # The names that these methods had before.
    told, heard, sent, far = num_sent, num_received, sent_slice, remote_tokens
    lead, own, local = num_leading, without_halo, local_tokens


def balanced_weights(
    tokens: int,
    world_size: int,
    *,
    causal: bool,
    linear: float,
    attention: float,
    code: float,
    far: float | None = None,
    receive: float = 0.0,
    halo: int = 0,
    beside: Sequence[float] = (),
) -> tuple[float, ...]:
    """Shares of the tokens with which all ranks of equal speed finish a block together.

    Costs are in FLOPs, or in whatever takes as long as another of it.

    Args:
        linear: of one token's projections and MLP.
        attention: of one query over one key.
        far: of one query over one key of another rank's; None: as long.
        code: of coding one token; the last rank of a decoder codes nothing.
        receive: of one remote token received, before attention reads it.
        halo: tokens before its shard that a rank computes, too (`Plan.halo`).
        beside: by rank, that of other work that it does meanwhile; empty: there is none. Of a
            decoder alone.

    A decoder's later ranks see more keys and so take fewer tokens; an encoder's take equal shares.
    """
    if not causal or world_size == 1:
        return (1.0,) * world_size
    others = tuple(beside) or (0.0,) * world_size
    far = attention if far is None else far

    def reach(budget: float) -> list[float]:
        """The bounds when every rank spends `budget`: solves for each shard's size in turn."""
        bounds = [0.0]
        for n in range(world_size):
            start, a = bounds[-1], attention / 2
            overlap = min(float(halo), start)
            received, coding = start - overlap, code if n < world_size - 1 else 0.0
            b = linear + far * received + coding
            left = max(0.0, budget - others[n] - receive * received + coding * overlap)
            # a·u² + b·u = left, u = halo and shard; the causal half of the local square is a·u²
            computed = 2 * left / (b + (b * b + 4 * a * left) ** 0.5)
            bounds.append(start + max(computed - overlap, 1e-3))
        return bounds

    low, high = 0.0, tokens * (linear + code + receive + attention * tokens) + max(others)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reach(middle)[-1] < tokens else (low, middle)
    bounds = reach(high)
    return tuple(after - before for before, after in pairwise(bounds))


def check_halo(halo: int, causal: bool) -> None:
    if halo < 0 or (halo and not causal):
        raise ValueError(
            "halo: expected 0 or more, and 0 for an encoder, whose tokens look both ways, "
            f"got {halo}"
        )
