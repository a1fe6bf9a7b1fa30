"""How quick a device is: seconds of the parts of a block, measured or worked out from FLOP/s."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

import astra_kernels as ak

from ..codes.base import Payload
from ..codes.codebook import Codebook
from ..costs import attention_pairs, costs_of
from ..models import Adapter, adapt
from ..models.families import ViT, pair
from ..plan import Plan

LEAST_CALLS, LEAST_SECONDS = 2, 0.02  # of a stage that is timed: a tiny one is timed often


@dataclass(frozen=True)
class Rates:
    """Seconds that one device needs, of one block where nothing else is said.

    Attributes:
        block: fixed, whatever the tokens.
        token: a token's projections and MLP.
        local_pair, remote_pair: one query over one key of its own rank's, of a remote token's.
        code: coding and packing one own token.
        receive: unpacking one remote token, with all that is computed for it before attention.
        once: outside of the blocks, embedding and head.
    """

    block: float
    token: float
    local_pair: float
    remote_pair: float
    code: float
    receive: float
    once: float = 0.0

    def slower(self, factor: float) -> Rates:
        """Of a device that takes `factor` times as long for everything."""
        return Rates(**{name: factor * value for name, value in vars(self).items()})


def rates_of_flops(adapter: Adapter, codebook: Codebook, flops: float) -> Rates:
    """Of a device that does `flops` FLOP/s whatever it computes; overheads are left out."""
    if not flops > 0:
        raise ValueError(f"flops: expected a positive rate, got {flops}")
    linear, attention = adapter.block_flops()
    costs = costs_of(adapter, codebook)
    remote = attention if costs.attended else 0.0
    flops_each = Rates(0.0, linear, attention, remote, costs.code, costs.receive + costs.sums)
    return flops_each.slower(1 / flops)


@torch.inference_mode()
def measure_rates(model: nn.Module, codebook: Codebook, tokens: int) -> Rates:
    """Of this device and its current number of threads, for inputs of about `tokens` tokens.

    Runs the model on `tokens` and (with token ids) on an eighth of them, and each stage of the
    exchange by itself; takes about four forward passes.
    """
    adapter = adapt(model)
    blocks, heads = len(adapter.blocks), adapter.num_key_value_heads
    own, remote = max(2, tokens // 4), max(2, tokens // 2)

    def random(count: int, heads: int) -> torch.Tensor:
        vectors = torch.randn(1, heads, count, adapter.head_dim, device=adapter.device)
        return vectors.to(adapter.dtype)

    def attention_seconds(count: int) -> float:
        query, key = random(count, adapter.num_heads), random(count, heads)
        scale = adapter.head_dim**-0.5
        return _seconds(
            lambda: ak.attention(query, key, key, is_causal=adapter.causal, scale=scale)
        )

    # an image has the patches that its model wants, so what depends on them is one figure
    few = max(2, tokens // 8) if adapter.token_ids else tokens
    of_attention = {count: attention_seconds(count) for count in (few, tokens)}
    passes = {count: _forward(model, adapter, count) for count in (few, tokens)}
    pure = {count: passes[count] / blocks - of_attention[count] for count in passes}
    token = max(0.0, pure[tokens] / tokens)
    if few < tokens:
        token = max(0.0, (pure[tokens] - pure[few]) / (tokens - few))
    pairs = attention_pairs(tokens, adapter.causal)
    rates = Rates(
        block=max(0.0, pure[tokens] - token * tokens),
        token=token,
        local_pair=of_attention[tokens] / pairs,
        remote_pair=0.0,
        code=0.0,
        receive=0.0,
    )
    if not codebook.codec.sends:
        return rates
    return replace(rates, **_exchange_rates(adapter, codebook, own, remote, random))


def _exchange_rates(
    adapter: Adapter, codebook: Codebook, own: int, remote: int, random: Callable[..., torch.Tensor]
) -> dict[str, float]:
    """code, receive and remote_pair: means over all blocks, each of which may have other codes."""
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

    # rank 0 codes `remote` tokens, rank 1 receives them and attends with `own` queries
    sender, receiver = (codec.begin(inputs, plan, rank) for rank in (0, 1))
    hidden = torch.randn(1, remote, adapter.hidden_size, device=adapter.device)
    what: Any = hidden.to(adapter.dtype)
    if not codec.early:
        what = (random(remote, heads), random(remote, heads))
    query, scale = random(own, adapter.num_heads), adapter.head_dim**-0.5
    spent = {"code": 0.0, "receive": 0.0, "remote_pair": 0.0}
    for block in range(len(blocks)):
        out = bytearray(codec.payload_bytes(block, 1, remote))
        view = memoryview(out)
        start = time.perf_counter()
        if out:
            sender.encode(block, what, cut(0), view)
        else:
            sender.pass_over(block, what, cut(0))
        coded = time.perf_counter()
        kept = receiver.decode(block, [Payload(view, remote, remote)], 1, cut(0))
        received = time.perf_counter()
        if kept is not None:
            receiver.attend(block, query, kept, cut(0), None, scale)
        stop = time.perf_counter()
        spent["code"] += coded - start
        spent["receive"] += received - coded
        spent["remote_pair"] += stop - received
    each = {"code": remote, "receive": remote, "remote_pair": own * remote}
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
