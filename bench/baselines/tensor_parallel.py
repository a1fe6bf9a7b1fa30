"""Tensor parallelism: every rank holds a slice of every matrix and computes all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .blocks import Part, Transformer, cut, every_position
from .comm import Comm


@torch.inference_mode()
def tp(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    comm: Comm,
    *,
    weights: Sequence[float] | None = None,
) -> Tensor | None:
    """Megatron-LM (arXiv 1909.08053): two all-reduces of all tokens a block.

    A rank has some of the attention heads and some of the MLP's inner channels: the first matrix
    of each pair is cut by columns, the second by rows, so a block needs one sum after each. Norms,
    embeddings and the head are computed on every rank; Megatron cuts the vocabulary, too, which for
    one token's logits would send more than it saves.

    Exact. A rank sends 2·2(N − 1)/N·D·32 bits a token and block. Every rank has the logits.

    Args:
        weights: shares of heads and inner channels, one a rank; None: equal as far as they divide.
    """
    transformer = Transformer.of(model)
    rope = transformer.rope(every_position(transformer.tokens(inputs), transformer.adapter.device))
    x = transformer.embed(inputs)
    for block in transformer.blocks:
        part = Part(
            heads=cut(block.heads, comm.world_size, weights)[comm.rank],
            inner=cut(len(block.up.weight), comm.world_size, weights)[comm.rank],
            biased=comm.rank == 0,
        )
        normed = block.norm1(x)
        key, value = block.keys_values(normed, rope, part)
        attended = block.attend(block.queries(normed, rope, part), key, value)
        x = x + comm.all_reduce(block.project(attended, part))
        x = x + comm.all_reduce(block.mlp(x, part))
    return transformer.answer(x)
