"""How long a first token will take, before anything is deployed.

Every rank's blocks are followed through time: project, code, send over its uplink, attend to its
own tokens, wait for the others' codes, attend to them, go on. What a stage takes comes from
`Rates`, a few figures of the device, measured on it (`measured`) or from its FLOP/s (`of_flops`).
The link is one full-duplex access link a rank, as in `transport/pacing.py`: a frame to N − 1 peers
crosses the uplink N − 1 times, frames to one rank queue on its downlink, headers count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

import astra_kernels as ak

from ..codes.base import Payload
from ..codes.codebook import Codebook
from ..costs import attention_pairs, costs_of, engine_plan
from ..exchange import go_by_tree
from ..models import Adapter, adapt
from ..models.families import ViT, pair
from ..plan import Plan
from ..transport import Link

TRIED = (0.0, 0.25, 0.5, 0.75, 1.0)  # of shares: 0 is the engine's own, 1 is equal ones
LEAST_CALLS, LEAST_SECONDS = 2, 0.02  # of a stage that is timed: a tiny one is timed often


@dataclass(frozen=True)
class Rates:
    """Seconds that one device needs, of one block where nothing else is said.

    Attributes:
        block: fixed, whatever the tokens.
        token: a token's projections and MLP.
        near, far: one query over one key of its own rank's, of a remote token's.
        code: coding and packing one own token.
        receive: unpacking one remote token, with all that is computed for it before attention.
        once: outside of the blocks, embedding and head.
    """

    block: float
    token: float
    near: float
    far: float
    code: float
    receive: float
    once: float = 0.0

    def slower(self, factor: float) -> Rates:
        """Of a device that takes `factor` times as long for everything."""
        return Rates(**{name: factor * value for name, value in vars(self).items()})


def of_flops(adapter: Adapter, codebook: Codebook, flops: float) -> Rates:
    """Of a device that does `flops` FLOP/s whatever it computes; overheads are left out."""
    if not flops > 0:
        raise ValueError(f"flops: expected a positive rate, got {flops}")
    linear, attention = adapter.block_flops()
    costs = costs_of(adapter, codebook)
    far = attention if costs.attended else 0.0
    found = Rates(0.0, linear, attention, far, costs.code, costs.receive)
    return found.slower(1 / flops)


@torch.inference_mode()
def measured(model: nn.Module, codebook: Codebook, tokens: int) -> Rates:
    """Of this device and its current number of threads, for inputs of about `tokens` tokens.

    Runs the model on `tokens` and (with token ids) on an eighth of them, and each stage of the
    exchange by itself; takes about four forward passes.
    """
    adapter = adapt(model)
    blocks, heads = len(adapter.blocks), adapter.num_key_value_heads
    own, remote = max(2, tokens // 4), max(2, tokens // 2)

    def random(count: int, of: int) -> torch.Tensor:
        found = torch.randn(1, of, count, adapter.head_dim, device=adapter.device)
        return found.to(adapter.dtype)

    def near(count: int) -> float:
        query, key = random(count, adapter.num_heads), random(count, heads)
        scale = adapter.head_dim**-0.5
        return _seconds(
            lambda: ak.attention(query, key, key, is_causal=adapter.causal, scale=scale)
        )

    # an image has the patches that its model wants, so what depends on them is one figure
    few = max(2, tokens // 8) if adapter.token_ids else tokens
    of_attention = {count: near(count) for count in (few, tokens)}
    passes = {count: _forward(model, adapter, count) for count in (few, tokens)}
    pure = {count: passes[count] / blocks - of_attention[count] for count in passes}
    token = max(0.0, pure[tokens] / tokens)
    if few < tokens:
        token = max(0.0, (pure[tokens] - pure[few]) / (tokens - few))
    pairs = attention_pairs(tokens, adapter.causal)
    rates = Rates(
        block=max(0.0, pure[tokens] - token * tokens),
        token=token,
        near=of_attention[tokens] / pairs,
        far=0.0,
        code=0.0,
        receive=0.0,
    )
    if not codebook.codec.sends:
        return rates
    return replace(rates, **_exchange_rates(adapter, codebook, own, remote, random))


def _exchange_rates(
    adapter: Adapter, codebook: Codebook, own: int, remote: int, random: Callable[..., torch.Tensor]
) -> dict[str, float]:
    """code, receive and far: means over all blocks, each of which may have other codes."""
    codec, heads = codebook.make_codec(adapter), adapter.num_key_value_heads
    blocks = adapter.blocks
    total = own + remote
    # of a picture the batch counts alone
    inputs = _inputs(adapter, total) if adapter.token_ids else {"pixel_values": torch.empty(1, 0)}
    copies = adapter.class_tokens
    plan = Plan((0, remote, total), adapter.causal, copies)
    positions = adapter.positions(inputs)
    rope = None if positions is None else adapter.rope(positions)

    def cut(rank: int) -> Any:
        return None if rope is None else tuple(t[:, plan.shard(rank)] for t in rope)

    # rank 0 codes `remote` tokens, rank 1 hears of them and asks with `own` queries
    sender, hearer = (codec.begin(inputs, plan, rank) for rank in (0, 1))
    hidden = torch.randn(1, remote, adapter.hidden_size, device=adapter.device)
    what: Any = hidden.to(adapter.dtype)
    if not codec.early:
        what = (random(remote, heads), random(remote, heads))
    query, scale = random(own, adapter.num_heads), adapter.head_dim**-0.5
    spent = {"code": 0.0, "receive": 0.0, "far": 0.0}
    for block in range(len(blocks)):
        out = bytearray(codec.payload_bytes(block, 1, remote))
        view = memoryview(out)
        start = time.perf_counter()
        if out:
            sender.encode(block, what, cut(0), view)
        coded = time.perf_counter()
        kept = hearer.decode(block, [Payload(view, remote, remote)], 1, cut(0))
        received = time.perf_counter()
        if kept is not None:
            hearer.attend(block, query, kept, cut(0), None, scale)
        stop = time.perf_counter()
        spent["code"] += coded - start
        spent["receive"] += received - coded
        spent["far"] += stop - received
    each = {"code": remote, "receive": remote, "far": own * remote}
    return {name: spent[name] / (len(blocks) * each[name]) for name in spent}


def _inputs(adapter: Adapter, tokens: int) -> dict[str, torch.Tensor]:
    """A random input of `tokens` tokens, beside the class token."""
    config = adapter.model.config
    if adapter.token_ids:
        shape = (1, tokens + adapter.class_tokens)
        return {"input_ids": torch.randint(int(config.vocab_size), shape, device=adapter.device)}
    patches = cast(ViT, adapter).num_patches
    if patches != tokens:
        raise ValueError(f"tokens: expected the {patches} patches of this model, got {tokens}")
    size = pair(config.image_size)
    pixels = torch.randn(1, int(config.num_channels), *size, device=adapter.device)
    return {"pixel_values": pixels.to(adapter.dtype)}


def _forward(model: nn.Module, adapter: Adapter, tokens: int) -> float:
    """Seconds of the model by itself, with the last token's logits only."""
    inputs: dict[str, Any] = _inputs(adapter, tokens)
    if hasattr(model, "lm_head"):
        inputs |= {"logits_to_keep": 1, "use_cache": False}
    return _seconds(lambda: model(**inputs))


def _seconds(call: Callable[[], object]) -> float:
    """The quickest of a few calls after a first one; of more where they are short."""
    call()
    quickest, spent, calls = float("inf"), 0.0, 0
    while calls < LEAST_CALLS or spent < LEAST_SECONDS:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        quickest, spent, calls = min(quickest, seconds), spent + seconds, calls + 1
    return quickest


@dataclass(frozen=True)
class Prediction:
    """Seconds from the input's presence on every rank to the answer on its owner.

    Attributes:
        busy: of each rank, computing; waiting: of each rank, for others.
    """

    seconds: float
    busy: tuple[float, ...]
    waiting: tuple[float, ...]


def single(adapter: Adapter, rates: Rates, tokens: int) -> float:
    """Seconds of one device."""
    count = tokens + adapter.class_tokens
    pairs = attention_pairs(count, adapter.causal)
    block = rates.block + rates.token * count + rates.near * pairs
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
    seconds = [single(adapter, of_rank, tokens) for of_rank in rates]
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
        near = rate.near * attention_pairs(count, plan.causal)
        received = sum(plan.num_received(n, source) for source in plan.sources(n))
        seeing = count - plan.copies if plan.causal else count
        rest = rate.receive * received + rate.far * seeing * received
        rest += (1 - self._before) * rate.token * count
        idle = max(0.0, arrived - sent - near)
        self.ready[n] = sent + near + idle + rest
        self.busy[n] += near + rest
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


def on_paper(
    adapter: Adapter,
    codebook: Codebook,
    rates: Rates,
    link: Link,
    tokens: int,
    world: int,
    *,
    two_level: bool = False,
) -> float:
    """Seconds to the answer of equal ranks in step, in closed form: for more ranks than one has.

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
    near = rates.near * (count * count / 2 if adapter.causal else count * count)
    work = rates.block + rates.token * count + near
    if world == 1:
        return rates.once + len(adapter.blocks) * work
    work += rates.code * own + rates.receive * received + rates.far * count * received
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
        total += work + max(0.0, exchange - near)
    return total
