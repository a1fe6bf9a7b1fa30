"""How long a first token will take, before anything is deployed.

Every rank's blocks are followed through time: project, code, send over its uplink, attend to its
own tokens, wait for the others' codes, attend to them, go on. What a stage takes comes from
`Rates`, a few figures of the device. The link is one full-duplex access link a rank, as in
`transport/pacing.py`: a frame to N − 1 peers crosses the uplink N − 1 times, frames to one rank
queue on its downlink, headers count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..codes.codebook import Codebook
from ..costs import attention_pairs, engine_plan
from ..exchange import go_by_tree
from ..models import Adapter
from ..plan import Plan
from ..transport import Link
from .rates import Rates

TRIED = (0.0, 0.25, 0.5, 0.75, 1.0)  # of shares: 0 is the engine's own, 1 is equal ones


@dataclass(frozen=True)
class Prediction:
    """Seconds from the input's presence on every rank to the answer on its owner.

    Attributes:
        busy: of each rank, computing; waiting: of each rank, for others.
    """

    seconds: float
    busy: tuple[float, ...]
    waiting: tuple[float, ...]


def one_device(adapter: Adapter, rates: Rates, tokens: int) -> float:
    """Seconds of one device."""
    count = tokens + adapter.class_tokens
    pairs = attention_pairs(count, adapter.causal)
    block = rates.block + rates.token * count + rates.local_pair * pairs
    return rates.once + len(adapter.blocks) * block


def first_token(
    adapter: Adapter,
    codebook: Codebook,
    plan: Plan,
    rates: Sequence[Rates],
    link: Link,
    payload: Callable[[int, int], float] | None = None,
) -> Prediction:
    """Follows all ranks of a plan through all blocks.

    Fine codes are counted on the links; their work, a few tokens' of each shard, is not.

    Args:
        rates: of every rank.
        link: of every rank.
        payload: bytes of a frame, by block and tokens; None: by the codebook's bits.
    """
    if len(rates) != plan.world_size:
        raise ValueError(f"rates: expected those of {plan.world_size} ranks, got {len(rates)}")
    bytes_of = payload or (lambda block, tokens: codebook.token_bits(adapter, block) * tokens / 8)
    ranks = _Ranks(adapter, codebook, plan, rates, link, bytes_of)
    for block in range(len(adapter.blocks)):
        ranks.pass_block(block)
    ready = ranks.ready
    answer = ready[plan.owner] if plan.causal else _class_tokens(adapter, ready, link)
    owner = rates[plan.owner]
    return Prediction(answer + owner.once, tuple(ranks.busy), tuple(ranks.waiting))


def quickest_plan(
    adapter: Adapter, codebook: Codebook, rates: Sequence[Rates], link: Link, tokens: int
) -> tuple[Plan, Prediction]:
    """The cut of `tokens` tokens with the soonest answer, and its prediction.

    The engine's own shares are such that ranks of one pace finish together. On a slow link that is
    not the quickest: a decoder's first rank sends to all others, so of many ranks it is the one
    whose uplink binds, and a smaller share for it is worth longer computing elsewhere. Tried are
    the engine's shares, equal ones and three in between, all by each device's pace.

    Args:
        rates: of every rank.
        tokens: beside the class token.
    """
    world = len(rates)
    balanced = engine_plan(adapter, codebook, tokens, world)
    seconds = [one_device(adapter, of_rank, tokens) for of_rank in rates]
    alike = max(seconds) == min(seconds)
    tried: list[tuple[Plan, Prediction]] = []
    for even in TRIED if adapter.causal and codebook.codec.sends else TRIED[:1]:
        plan = balanced
        if even or not alike:
            shares = [balanced.size(n) ** (1 - even) / seconds[n] for n in range(world)]
            plan = engine_plan(adapter, codebook, tokens, world, shard_weights=shares)
        tried.append((plan, first_token(adapter, codebook, plan, rates, link)))
    return min(tried, key=lambda each: each[1].seconds)


class _Ranks:
    """All ranks on their way through the blocks, in seconds from the beginning.

    Args:
        bytes_of: of a frame, by block and tokens.

    Attributes:
        ready: when each rank has the blocks so far behind it.
        busy, waiting: for how long each has computed, and waited for codes.
    """

    def __init__(
        self,
        adapter: Adapter,
        codebook: Codebook,
        plan: Plan,
        rates: Sequence[Rates],
        link: Link,
        bytes_of: Callable[[int, int], float],
    ) -> None:
        self._codebook, self._plan, self._rates, self._link = codebook, plan, rates, link
        self._bytes_of, self._world = bytes_of, plan.world_size
        # of a token's linear work, the share before its codes are known
        self._before = 0.0 if codebook.codec.early else _projected_first(adapter)
        self._counts = [plan.size(n) + plan.num_leading(n) for n in range(self._world)]
        zeros = [0.0] * self._world
        self.ready, self.busy, self.waiting = zeros[:], zeros[:], zeros[:]
        self._uplink, self._downlink = zeros[:], zeros[:]  # when each is free again

    def pass_block(self, block: int) -> None:
        sent: list[float] = []
        frames: list[tuple[float, float, int]] = []  # on the uplink from, for how long, to whom
        for n in range(self._world):
            size = self._size(block, n)
            sent.append(self._encode(n, size))
            frames += self._send(block, n, size, sent[n])
        arrived = self._deliver(frames)
        for n in range(self._world):
            self._attend(n, sent[n], arrived[n])

    def _size(self, block: int, n: int) -> float:
        """Bytes of the codes that a rank sends to each that sees its tokens."""
        count = self._plan.num_sent(n)
        return self._bytes_of(block, count) if count else 0.0

    def _encode(self, n: int, size: float) -> float:
        """When a rank's codes are made."""
        rate = self._rates[n]
        first = rate.block + self._before * rate.token * self._counts[n]
        first += rate.code * self._plan.num_sent(n) if size else 0.0
        self.busy[n] += first
        return self.ready[n] + first

    def _send(self, block: int, n: int, size: float, sent: float) -> list[tuple[float, float, int]]:
        """A rank's frames, one after the other on its uplink."""
        frames, start = [], max(sent, self._uplink[n])
        takes = self._link.seconds(math.ceil(size)) if size else 0.0
        receivers = self._plan.receivers(n) if size else ()
        for receiver in receivers:
            next_rank = receiver == n + 1
            fine = _fine_bytes(self._codebook, self._plan, block, n) if next_rank else 0.0
            longer = self._link.seconds(math.ceil(size + fine)) if fine else takes
            frames.append((start, longer, receiver))
            start += longer
            self._uplink[n] = start
        return frames

    def _deliver(self, frames: Sequence[tuple[float, float, int]]) -> list[float]:
        """When each rank has all its frames."""
        arrived = [0.0] * self._world
        for start, takes, receiver in sorted(frames):
            # through the switch as it comes: the last bit leaves both links at the same time
            free = max(self._downlink[receiver], start) + takes
            self._downlink[receiver] = free
            arrived[receiver] = max(arrived[receiver], free + self._link.delay_ms / 1e3)
        return arrived

    def _attend(self, n: int, sent: float, arrived: float) -> None:
        """A rank attends to its own tokens and to the others', and goes on to the next block."""
        plan, rate, count = self._plan, self._rates[n], self._counts[n]
        local = rate.local_pair * attention_pairs(count, plan.causal)
        received = sum(plan.num_received(n, source) for source in plan.sources(n))
        seeing = count - plan.copies if plan.causal else count
        rest = rate.receive * received + rate.remote_pair * seeing * received
        rest += (1 - self._before) * rate.token * count
        idle = max(0.0, arrived - sent - local)
        self.ready[n] = sent + local + idle + rest
        self.busy[n] += local + rest
        self.waiting[n] += idle


def _fine_bytes(codebook: Codebook, plan: Plan, block: int, rank: int) -> float:
    """Of a block's frame from `rank` to the next, behind the codes that every receiver gets."""
    if not codebook.fine:
        return 0.0
    tokens = plan.fine_tokens(rank, codebook.fine_tokens)
    bits = codebook.fine[block].codes * codebook.fine_code_bits
    return bits * (tokens.stop - tokens.start) / 8


def bits_sent(adapter: Adapter, codebook: Codebook, plan: Plan) -> float:
    """Bits of a token and block in a call of `plan`, fine codes counted as the engine does: each
    payload once, over the tokens that are sent. Up to whole bytes the engine's own number."""
    ranks, blocks = range(plan.world_size), range(len(adapter.blocks))
    tokens = sum(plan.num_sent(rank) for rank in ranks)
    if not tokens:
        return 0.0
    fine = 8 * sum(_fine_bytes(codebook, plan, block, n) for block in blocks for n in ranks)
    return codebook.token_bits(adapter) + fine / (tokens * len(blocks))


def _class_tokens(adapter: Adapter, ready: Sequence[float], link: Link) -> float:
    """When rank 0 has every copy of the class token or their sum, an fp32 vector each."""
    world = len(ready)
    if world == 1:
        return ready[0]
    takes, delay = link.seconds(4 * adapter.hidden_size), link.delay_ms / 1e3
    if not go_by_tree(world, adapter.dtype):
        free = 0.0
        for start in sorted(ready[1:]):
            free = max(free, start) + takes
        return max(ready[0], free + delay)
    has, step = list(ready), 1
    while step < world:
        for rank in range(0, world - step, 2 * step):
            has[rank] = max(has[rank], has[rank + step] + takes + delay)
        step *= 2
    return has[0]


def _projected_first(adapter: Adapter) -> float:
    """The share of a token's linear work that is done before keys and values are known."""
    linear, _ = adapter.block_flops()
    width = (adapter.num_heads + 2 * adapter.num_key_value_heads) * adapter.head_dim
    return 2.0 * adapter.hidden_size * width / linear


def closed_form(
    adapter: Adapter,
    codebook: Codebook,
    rates: Rates,
    link: Link,
    tokens: int,
    world: int,
    *,
    two_level: bool = False,
) -> float:
    """Seconds to the answer of equal ranks in lockstep: for more ranks than can be followed.

    Every block of every rank takes its own work, and the exchange as far as attention to the own
    tokens does not hide it. In a full mesh a rank sends N − 1 frames of its own tokens' codes. With
    `two_level`, ranks stand in rows and columns of about √N: codes go along the row first, then
    each rank sends its row's to its column. That is as many bytes of codes in 2·(√N − 1) frames,
    each with its headers, and one more latency; no order of exchange lowers what a rank has to
    receive, all codes of all others, N − 1 frames' worth on its downlink. Fine codes are not
    counted.
    """
    if world < 1 or tokens < world:
        raise ValueError(f"world: expected 1 to {tokens} ranks, one a token, got {world}")
    own = tokens / world
    count = own + adapter.class_tokens
    received = tokens - own
    if adapter.causal:  # later ranks receive more; balanced shares give each the mean
        received /= 2
    local = rates.local_pair * (count * count / 2 if adapter.causal else count * count)
    work = rates.block + rates.token * count + local
    if world == 1:
        return rates.once + len(adapter.blocks) * work
    work += rates.code * own + rates.receive * received + rates.remote_pair * count * received
    total = rates.once
    for block in range(len(adapter.blocks)):
        size = codebook.token_bits(adapter, block) * own / 8
        exchange = 0.0
        if size:
            delay = link.delay_ms / 1e3
            if two_level:
                row = round(world**0.5)
                column = -(-world // row)
                first = (row - 1) * link.seconds(math.ceil(size)) + delay
                gathered = math.ceil(size * row)
                exchange = first + (column - 1) * link.seconds(gathered) + delay
            else:
                exchange = (world - 1) * link.seconds(math.ceil(size)) + delay
        total += work + max(0.0, exchange - local)
    return total
