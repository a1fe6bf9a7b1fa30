"""What a plan costs in FLOPs, beside the ideal: the single device's work in N equal parts; and the
plan of equal times.

Counted as in `Adapter.block_flops`: products of matrices, a multiplication and an addition each;
norms, activations, sums and lookups are left out, and so are embeddings and the head. Sums of table
rows that stand for a product are counted, an addition as one FLOP. Attention counts the pairs of a
query and a key that it sees, so a causal square is half of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from astra_kernels import _direct as direct

from .codes.base import CodeCosts
from .codes.codebook import Codebook
from .models import Adapter
from .plan import FINE_PART, Plan, balanced_weights

HALO = 32  # tokens
# A decoder's input of so many tokens is computed from its start on every rank: exact, at no bits.
# Reading the weights takes as long for few tokens as for one, and each block is spared an exchange.
EXACT_TOKENS = 64
# How long a FLOP takes beside one of attention: of a linear layer, by what its weights are kept in
# (of any other form as long), of coding, and of attention to tokens that may be rounded. SmolLM2's
# on one core of an EPYC, with and without AVX-512 VNNI. Stated, as what ranks measure varies.
LINEAR_PACE: Final = {"int8": 0.38, "int4": 0.5}
LINEAR_PACE_WITHOUT_VNNI: Final = {"int8": 0.67, "int4": 0.8}
CODING_PACE: Final = 1.3
ROUNDED_PACE: Final = 0.66
SUMS_PACE: Final = 10.0  # of sums of table rows, which come from memory


class Paces(NamedTuple):
    """How long a FLOP takes on a device, beside one of attention in fp32.

    Attributes:
        linear: of the linear layers.
        far: of attention to other ranks' tokens.
    """

    linear: float = 1.0
    far: float = 1.0

    @classmethod
    def of(cls, adapter: Adapter, codebook: Codebook) -> Paces:
        """Of this process, by what its processor has."""
        linear = LINEAR_PACE if direct.HAS_VNNI else LINEAR_PACE_WITHOUT_VNNI
        rounds = codebook.codec.rounds(codebook)
        rounds = rounds and direct.rounds_attention(adapter.device, adapter.dtype)
        return cls(linear.get(adapter.form(), 1.0), ROUNDED_PACE if rounds else 1.0)

    def __str__(self) -> str:
        return " ".join(repr(pace) for pace in self)

    @classmethod
    def slowest(cls, paces: Sequence[str]) -> Paces:
        """What all ranks count with, of `str` of each one's own.

        Example:
            >>> Paces.slowest([str(Paces(0.38, 0.66)), str(Paces(0.67, 0.66))])
            Paces(linear=0.67, far=0.66)
        """
        of_ranks = [[float(pace) for pace in text.split()] for text in paces]
        return cls(*(max(each) for each in zip(*of_ranks, strict=True)))


def engine_plan(
    adapter: Adapter,
    codebook: Codebook,
    tokens: int,
    world_size: int,
    *,
    shard_weights: Sequence[float] | None = None,
    padding: int = 0,
    halo: int | None = None,
    beside: Sequence[float] = (),
    paces: Paces | None = None,
) -> Plan:
    """The cut of a sequence of `tokens` tokens, the class token not counted.

    Args:
        shard_weights: shares of the tokens; None: `balanced_shares`.
        padding: in front of the text. Where the codebook has every rank compute the first tokens
            itself, padding is taken along.
        halo: see `Plan`; None: all before the shard in inputs of up to `EXACT_TOKENS` tokens, else
            `default_halo`.
        beside: by rank, what it computes meanwhile, in tokens of such a sequence: it takes fewer of
            this one. Empty: nothing. Without effect beside `shard_weights`.
        paces: see `balanced_shares`.
    """
    copies = adapter.class_tokens
    if adapter.causal and world_size > 1 and codebook.prefix:
        copies = max(0, min(padding + codebook.prefix, tokens - world_size))
        tokens -= copies
    if halo is None and adapter.causal and codebook.coded and copies + tokens <= EXACT_TOKENS:
        halo = tokens
    elif halo is None:
        halo = default_halo(adapter, codebook, tokens, world_size)
    if shard_weights is None:
        shard_weights = balanced_shares(
            adapter, codebook, tokens, world_size, halo=halo, beside=beside, paces=paces
        )
    return Plan.make(
        tokens,
        world_size,
        causal=adapter.causal,
        copies=copies,
        halo=halo,
        shard_weights=shard_weights,
    )


def balanced_shares(
    adapter: Adapter,
    codebook: Codebook,
    tokens: int,
    world_size: int,
    *,
    halo: int,
    past: int = 0,
    beside: Sequence[float] = (),
    paces: Paces | None = None,
) -> tuple[float, ...]:
    """Shares of `tokens` tokens, replicated ones not counted, with which ranks finish together.

    Args:
        past: tokens before them that every rank has.
        beside: by rank, what it computes meanwhile, in tokens of such a sequence; empty: nothing.
        paces: that all ranks count with, None: this process's. Ranks that cut by unlike ones
            refuse each other's frames.
    """
    linear, attention = adapter.block_flops()
    costs = costs_of(adapter, codebook)
    paces = Paces.of(adapter, codebook) if paces is None else paces
    linear *= paces.linear
    others = [count * (linear + attention * tokens / 2) for count in beside or [0.0] * world_size]
    fine = min(codebook.fine_tokens, FINE_PART * tokens / world_size)
    for rank in range(world_size - 1):
        others[rank] += fine * (CODING_PACE * costs.fine_code + SUMS_PACE * costs.fine_sums)
        others[rank + 1] += fine * CODING_PACE * costs.fine_receive
    return balanced_weights(
        tokens,
        world_size,
        causal=adapter.causal,
        linear=linear + attention * past,
        attention=attention,
        far=attention * paces.far,
        code=CODING_PACE * costs.code,
        receive=CODING_PACE * costs.receive + SUMS_PACE * costs.sums,
        halo=halo,
        beside=others,
    )


def default_halo(adapter: Adapter, codebook: Codebook, tokens: int, world_size: int) -> int:
    """Tokens before its shard that a rank computes where nobody says how many.

    Enough for what codes cost most to be gone (DESIGN.md), and never much beside the shard itself.
    None where fine codes do the same for less.
    """
    if not (adapter.causal and codebook.coded) or codebook.fine or world_size == 1:
        return 0
    return min(HALO, tokens // (8 * world_size))


def costs_of(adapter: Adapter, codebook: Codebook) -> CodeCosts:
    """What the codebook's codec adds to the model's own work."""
    return codebook.codec.costs(codebook, adapter)


def single_flops(adapter: Adapter, tokens: int) -> float:
    """FLOPs of all blocks on one device, of `tokens` tokens and the class token."""
    linear, attention = adapter.block_flops()
    count = tokens + adapter.class_tokens
    pairs = attention_pairs(count, adapter.causal)
    return len(adapter.blocks) * (linear * count + attention * pairs)


def rank_flops(adapter: Adapter, codebook: Codebook, plan: Plan) -> list[float]:
    """FLOPs of all blocks, by rank."""
    linear, attention = adapter.block_flops()
    costs = costs_of(adapter, codebook)
    by_rank = []
    for rank in range(plan.world_size):
        queries = plan.size(rank) + plan.num_leading(rank)
        received = sum(plan.num_received(rank, n) for n in plan.sources(rank))
        if not costs.attended:
            received = 0
        # a decoder's replicated tokens, the first of the sequence, see no others
        attending = queries - plan.copies if plan.causal else queries
        pairs = attention_pairs(queries, plan.causal) + attending * received
        model, coding = linear * queries + attention * pairs, costs.code * plan.num_sent(rank)
        coding += (costs.fine_code + costs.fine_sums) * _num_fine(plan, rank, codebook)
        if rank:
            coding += costs.fine_receive * _num_fine(plan, rank - 1, codebook)
        coding += (costs.receive + costs.sums) * received
        by_rank.append(len(adapter.blocks) * (model + coding))
    return by_rank


def _num_fine(plan: Plan, rank: int, codebook: Codebook) -> int:
    """Tokens of `rank` that the next rank gets fine codes of."""
    tokens = plan.fine_tokens(rank, codebook.fine_tokens)
    return tokens.stop - tokens.start


def flops_over_ideal(
    adapter: Adapter,
    codebook: Codebook,
    tokens: int,
    world_size: int,
    plan: Plan | None = None,
) -> float:
    """FLOPs of the rank with most work, over those of one device divided by N: 1 is ideal.

    Args:
        adapter: of the model, from `astra_runtime.models.adapt`.
        codebook: space, groups and codewords count; it need not be the model's own.
        tokens: tokens of the sequence, the class token not counted.
        world_size: N.
        plan: another cut than the engine's own.

    Raises:
        ValueError: a plan of other tokens or ranks.
    """
    plan = plan or engine_plan(adapter, codebook, tokens, world_size)
    whole = plan.tokens + (plan.copies if plan.causal else 0)
    if (whole, plan.world_size) != (tokens, world_size):
        raise ValueError(
            f"plan: expected {tokens} tokens and {world_size} ranks, "
            f"got {whole} and {plan.world_size}"
        )
    return max(rank_flops(adapter, codebook, plan)) * world_size / single_flops(adapter, tokens)


def attention_pairs(tokens: int, causal: bool) -> float:
    """Pairs of a query and a key that it sees, among tokens that are all on one device."""
    return tokens * (tokens + 1) / 2 if causal else float(tokens * tokens)
