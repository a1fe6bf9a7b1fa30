"""Which ranks compute a session's new tokens, and which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import costs
from ..engine_parts import EngineParts
from ..plan import Plan


@dataclass(frozen=True)
class Cut:
    """The new tokens of a session, cut over some of the ranks.

    Attributes:
        members: the ranks that compute a shard, in the order of the sequence. The last one has the
            logits then.
        plan: of the new tokens alone, over the members. Its replicated tokens, the attention sinks
            that are kept exact, are computed by every rank of the mesh.
    """

    members: tuple[int, ...]
    plan: Plan

    def computed(self, rank: int) -> list[tuple[int, int]]:
        """The new tokens that `rank` computes, as intervals [start, stop)."""
        plan = self.plan
        intervals = [(0, plan.copies)]
        if rank in self.members:
            shard = plan.shard(self.members.index(rank))
            halo = plan.num_leading(self.members.index(rank)) - plan.copies
            intervals.append((shard.start - halo, shard.stop))
        return [(start, stop) for start, stop in intervals if start < stop]


def cut(
    engine: EngineParts, past: int, tokens: int, owner: int, beside: Sequence[float] = ()
) -> Cut:
    """The cut of `tokens` new tokens behind `past` others, so that `owner` has the last of them.

    A first prompt of some length is cut as the engine cuts it. Else by cost: an exchange in every
    block counts as much as computing `EXACT_TOKENS` / 2 tokens, so few tokens go to one rank.

    beside: by rank, what it computes meanwhile, in tokens of a first prompt (`engine_plan`).
    """
    world_size, prefix = engine.mesh.world_size, engine.codebook.prefix
    copies = min(max(0, prefix - past), tokens)
    whole_mesh = 1 < world_size <= tokens - copies
    if past == 0 and whole_mesh and tokens > costs.EXACT_TOKENS:
        plan = costs.engine_plan(
            engine.adapter,
            engine.codebook,
            tokens,
            world_size,
            shard_weights=_weights(engine, owner),
            halo=engine.halo,
            beside=_from(owner + 1, beside),
            paces=engine.paces,
        )
        return Cut(_members(owner, world_size, world_size), plan)
    candidates = range(1, max(1, min(world_size, tokens - copies)) + 1)
    weights = _weights(engine, owner)
    plans = [_plan(engine, past, tokens - copies, copies, count, weights) for count in candidates]
    times = [_cost(engine, past, plan) for plan in plans]
    best = plans[times.index(min(times))]
    return Cut(_members(owner, best.world_size, world_size), best)


def _members(owner: int, count: int, world_size: int) -> tuple[int, ...]:
    return tuple((owner - count + 1 + n) % world_size for n in range(count))


def _weights(engine: EngineParts, owner: int) -> tuple[float, ...] | None:
    """The ranks' shares in the order in which `owner` is the last."""
    weights = engine.shard_weights
    return None if weights is None else _from(owner + 1, weights)


def _from(first: int, of_ranks: Sequence[float]) -> tuple[float, ...]:
    return (*of_ranks[first:], *of_ranks[:first])


def _plan(
    engine: EngineParts,
    past: int,
    tokens: int,
    copies: int,
    ranks: int,
    weights: tuple[float, ...] | None,
) -> Plan:
    if ranks == 1:
        return Plan((0, tokens), True, copies)
    adapter, codebook = engine.adapter, engine.codebook
    halo = engine.halo
    if halo is None:
        halo = costs.default_halo(adapter, codebook, tokens, ranks)
    if weights is None or len(weights) != ranks:
        weights = costs.balanced_shares(
            adapter, codebook, tokens, ranks, halo=halo, past=past, paces=engine.paces
        )
    return Plan.make(tokens, ranks, causal=True, copies=copies, halo=halo, shard_weights=weights)


def _cost(engine: EngineParts, past: int, plan: Plan) -> float:
    """What the busiest rank does, in FLOPs, an exchange in each block included."""
    adapter = engine.adapter
    linear, attention = adapter.block_flops()
    blocks = len(adapter.blocks)
    exchange = linear * costs.EXACT_TOKENS / 2 if plan.world_size > 1 else 0.0
    by_rank = [
        flops + blocks * attention * past * _queries(plan, rank)
        for rank, flops in enumerate(costs.rank_flops(adapter, engine.codebook, plan))
    ]
    return max(by_rank) + blocks * exchange


def _queries(plan: Plan, rank: int) -> int:
    return plan.size(rank) + plan.num_leading(rank)
