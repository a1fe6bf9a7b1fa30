"""Sequence parallelism: every rank holds the whole model and computes a slice of the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from astra_runtime.codes.dense import int8
from astra_runtime.plan import Plan

from .blocks import Block, Rope, Transformer, cut_rope, every_position
from .comm import Comm, Shape

FORMATS = ("float32", "float16", "int8")
EXCHANGES = ("auto", "hidden", "kv")


@torch.inference_mode()
def sp(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    comm: Comm,
    *,
    dtype: str = "float32",
    exchange: str = "auto",
    weights: Sequence[float] | None = None,
) -> Tensor | None:
    """Voltage ("When the Edge Meets Transformers", ICDCS 2024): one all-gather a block.

    A rank computes its own tokens, for which it needs the keys and values of all that they see.
    "hidden", as in Voltage, gathers block inputs, D numbers a token, and every rank computes the
    keys and values of all tokens that it sees itself. "kv" gathers keys and values, 2·Hkv·d
    numbers, and computes none twice. Voltage also multiplies in the order (x W_q W_kᵀ) xᵀ where
    that is cheaper, which takes more ranks than D/d; not done here.

    The first block's input is on every rank, so L − 1 of L blocks gather. As published, all ranks
    get all tokens; a decoder's do not compute the keys and values of tokens that they cannot see.

    Exact in float32; with float16 and int8 a rank's own tokens stay in full precision. A rank sends
    (N − 1)/N·D·32 bits a token and gathering block with "hidden". The rank with the last token (the
    class token, rank 0) has the logits, the others return None.

    Args:
        dtype: of what is sent: "float32", "float16", "int8" (with an fp16 step a vector: a token's
            D channels, or a head's d).
        exchange: "auto" takes the fewer numbers: "kv" where 2·Hkv·d < D, as with grouped queries.
        weights: shares of the tokens, one a rank; None: equal.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dtype: expected one of {', '.join(FORMATS)}, got {dtype!r}")
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange: expected one of {', '.join(EXCHANGES)}, got {exchange!r}")
    transformer = Transformer.of(model)
    tokens = transformer.tokens(inputs)
    plan = transformer.plan(tokens, comm.world_size, weights)
    rope = transformer.rope(every_position(tokens, transformer.adapter.device))
    own, rank = plan.shard(comm.rank), comm.rank
    x = transformer.embed(inputs)
    for index, block in enumerate(transformer.blocks):
        if index == 0:  # every rank has all tokens
            x = block.among(*_seen(plan, rank, x), rope)
        elif _by_keys(exchange, block):
            x = _gather_keys(block, x, plan, comm, cut_rope(rope, own), dtype)
        else:
            shapes = [(len(x), plan.size(n), x.shape[2]) for n in range(plan.world_size)]
            everyone = gather(comm, x, shapes, dtype)
            x = block.among(*_seen(plan, rank, torch.cat(everyone, 1)), rope)
    return transformer.answer(x) if rank == plan.owner else None


def _by_keys(exchange: str, block: Block) -> bool:
    fewer = 2 * block.kv_heads * block.head_dim < block.query.weight.shape[1]
    return fewer if exchange == "auto" else exchange == "kv"


def _seen(plan: Plan, rank: int, x: Tensor) -> tuple[Tensor, slice]:
    """Of all tokens [B, T, D] those that a rank's own see, and where its own are among them."""
    own = plan.shard(rank)
    return (x[:, : own.stop] if plan.causal else x), own


def _gather_keys(block: Block, x: Tensor, plan: Plan, comm: Comm, rope: Rope, dtype: str) -> Tensor:
    normed = block.norm1(x)
    pair = torch.stack(block.keys_values(normed, rope))  # [2, B, Hkv, T_n, d]
    head = (*pair.shape[:3], pair.shape[4])
    shapes = [(*head[:3], plan.size(n), head[3]) for n in range(plan.world_size)]
    pairs = gather(comm, pair, shapes, dtype)
    key, value = torch.cat(pairs[: comm.rank + 1] if plan.causal else pairs, 3)
    return block.after(x, block.attend(block.queries(normed, rope), key, value))


def gather(comm: Comm, x: Tensor, shapes: Sequence[Shape], dtype: str) -> list[Tensor]:
    """An all-gather of vectors [..., d] in a format of fewer bits; the own ones come back as is."""
    if dtype == "float32":
        return comm.all_gather(x.contiguous(), shapes)
    if dtype == "float16":
        top = torch.finfo(torch.float16).max  # a few massive activations exceed it
        received = comm.all_gather(x.clamp(-top, top).half(), shapes)
        gathered = [half.to(x.dtype) for half in received]
    else:
        counts = [torch.Size(shape).numel() for shape in shapes]
        sizes = [(count + 2 * (count // x.shape[-1]),) for count in counts]
        codes, step = int8(x)
        message = torch.cat([part.reshape(-1).view(torch.uint8) for part in (codes, step)])
        received = comm.all_gather(message, sizes)
        gathered = [
            _restored(data, count, shape).to(x.dtype)
            for data, count, shape in zip(received, counts, shapes, strict=True)
        ]
    gathered[comm.rank] = x
    return gathered


def _restored(data: Tensor, count: int, shape: Shape) -> Tensor:
    """The vectors of an int8 message: `count` codes, then a step a vector."""
    step = data[count:].clone().view(torch.float16)  # a view needs an even offset
    return data[:count].view(torch.int8).view(*shape).float() * step.view(*shape[:-1], 1)
