"""Block parallelism: most layers are cut into independent sub-blocks, one a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .blocks import Part, Transformer, cut, every_position
from .comm import Comm


@torch.inference_mode()
def bp(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    comm: Comm,
    *,
    blocks: int = 1,
    sequence_parallel: bool = False,
    weights: Sequence[float] | None = None,
) -> Tensor | None:
    """DeTransformer (Wei et al., DATE 2024; Du et al., TPDS 2025), BP+AG and BP+SP.

    The model is a row of `blocks` (Nb) groups of layers. The last layer of each is an original one;
    the others are decoupled: N sub-blocks side by side, each a Transformer layer on D/N of the
    channels, which never see each other. So a rank computes its sub-block of all tokens without
    a word, and channels are gathered before an original layer only. That one is computed

    - by every rank, all of it (BP+AG): its output needs no exchange;
    - by sequence parallelism (BP+SP): each rank computes its own tokens, and where decoupled layers
      follow, an all-to-all hands every rank its channels of all tokens.

    An approximation: decoupled layers are another architecture, and have to be trained. Here
    sub-block n takes the model's own weights where channels n meet heads n, and channels n meet all
    inner channels of the MLP, which are the matrices' shapes in the authors' artifact; so times and
    bytes are right, the answer is not the model's. It is with one rank, or with as many
    groups as layers. The artifact gives a sub-block all heads, each narrower; here it has H/N of
    full width, as much work in fewer softmaxes.

    A rank sends Nb·(N − 1)/N·D·32 bits a token for all blocks together (BP+SP: and (Nb − 1)/N of
    that once more). With BP+AG every rank has the logits; with BP+SP the one with the last
    (class) token does, the others return None.

    Args:
        blocks: Nb, at most the number of layers; the groups need not be equal.
        sequence_parallel: BP+SP.
        weights: shares of channels, heads and tokens, one a rank; None: equal.
    """
    transformer, size = Transformer.of(model), comm.world_size
    originals = original_layers(len(transformer.blocks), blocks)
    tokens = transformer.tokens(inputs)
    plan = transformer.plan(tokens, size, weights)
    rope = transformer.rope(every_position(tokens, transformer.adapter.device))
    whole = transformer.embed(inputs)
    batch, _, width = whole.shape
    channels = cut(width, size, weights)
    heads = cut(transformer.blocks[0].heads, size, weights)
    mine, own = channels[comm.rank], plan.shard(comm.rank)
    seen = slice(0, own.stop if plan.causal else tokens)
    widths = [(batch, tokens, n.stop - n.start) for n in channels]
    x, at_hand = whole[..., mine], True  # at_hand: this rank has all channels of x in `whole`
    for index, block in enumerate(transformer.blocks):
        if index not in originals:
            x = block.whole(x, rope, Part(heads=heads[comm.rank], channels=mine))
            at_hand = False
            continue
        if not at_hand:
            whole = torch.cat(comm.all_gather(x.contiguous(), widths), -1)
        if not sequence_parallel:
            whole = block.whole(whole, rope)
            x, at_hand = whole[..., mine], True
            continue
        part = block.among(whole[:, seen], own, rope)
        if index == len(transformer.blocks) - 1:
            return transformer.answer(part) if comm.rank == plan.owner else None
        shapes = [(batch, plan.size(n), widths[comm.rank][2]) for n in range(size)]
        x = torch.cat(comm.all_to_all([part[..., n] for n in channels], shapes), 1)
        at_hand = False
    return transformer.answer(whole)


def original_layers(layers: int, blocks: int) -> set[int]:
    """The last layers of `blocks` groups, as equal as they can be; always that of the model."""
    if not 1 <= blocks <= layers:
        raise ValueError(f"blocks: expected 1 to {layers}, the number of layers, got {blocks}")
    return {group.stop - 1 for group in cut(layers, blocks)}
