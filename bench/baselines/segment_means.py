"""Segment means: a rank knows the others' tokens as averages over runs of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .blocks import Transformer, cut, cut_rope, every_position
from .comm import Comm


@torch.inference_mode()
def segment_means(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    comm: Comm,
    *,
    rate: float = 128,
    weights: Sequence[float] | None = None,
) -> Tensor | None:
    """PRISM (arXiv 2507.12145): one vector stands for a segment of `rate` tokens.

    A rank computes its own tokens. It cuts them into segments and sends the mean of the block's
    input over each. A receiver computes keys and values of the means, and attends to its own tokens
    and to them in one softmax, in which a mean counts as often as it has tokens: ln(count) is
    added to its score. So no keys and values are computed for remote tokens themselves. A decoder's
    rank sees the means of earlier ranks only.

    An approximation, which its authors make good by fine-tuning; exact with one rank, and where a
    segment is one token. The means of the first block's input are computed, not sent, as its
    input is on every rank. PRISM has no rotary positions; here a mean's key stands at its
    segment's mean position.

    A rank sends (N − 1)/N·D·32/rate bits a token and block, but the first. The rank with the
    last token (the class token, rank 0) has the logits, the others return None.

    Args:
        rate: tokens a segment, "compression rate" in the paper; a rank has at least one segment.
        weights: shares of the tokens, one a rank; None: equal.
    """
    if rate < 1:
        raise ValueError(f"rate: expected at least 1, got {rate}")
    transformer = Transformer.of(model)
    device = transformer.adapter.device
    tokens = transformer.tokens(inputs)
    plan = transformer.plan(tokens, comm.world_size, weights)
    own, sources = plan.shard(comm.rank), plan.sources(comm.rank)
    ranks = range(plan.world_size)
    sizes = [segment_sizes(plan.size(n), rate) for n in ranks]
    positions = every_position(tokens, device).float()[None, :, None]
    remote = [means(positions[:, plan.shard(n)], sizes[n]) for n in sources]
    rope = transformer.rope(torch.cat([*remote, positions[:, own]], 1)[0, :, 0])
    counts = [size for n in sources for size in sizes[n]]
    everything = transformer.embed(inputs)
    bias = _bias(counts, everything[0, own, :1], transformer.causal)
    x = everything[:, own]
    shapes = [(len(x), len(sizes[n]), x.shape[2]) for n in ranks]
    for index, block in enumerate(transformer.blocks):
        if index == 0:
            remote_means = [means(everything[:, plan.shard(n)], sizes[n]) for n in ranks]
        else:
            remote_means = comm.all_gather(means(x, sizes[comm.rank]), shapes)
        normed = block.norm1(torch.cat([*(remote_means[n] for n in sources), x], 1))
        here = slice(len(counts), None)
        query = block.queries(normed[:, here], cut_rope(rope, here))
        key, value = block.keys_values(normed, rope)
        x = block.after(x, block.attend(query, key, value, bias))
    return transformer.answer(x) if comm.rank == plan.owner else None


def segment_sizes(tokens: int, rate: float) -> list[int]:
    """Tokens of each segment of a shard: about `rate`, as equal as they can be."""
    return [s.stop - s.start for s in cut(tokens, max(1, round(tokens / rate)))]


def means(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[B, T, D] -> [B, segments, D]."""
    return torch.stack([segment.mean(1) for segment in x.split(list(sizes), 1)], 1)


def _bias(counts: Sequence[int], like: Tensor, causal: bool) -> Tensor | None:
    """[M, segments + M]: ln(count) for means, -inf where a decoder's own token comes later.

    None where no means are seen: the first rank of a decoder. `like` is [M, 1].
    """
    if not counts:
        return None
    far = like.new_tensor([math.log(count) for count in counts]).expand(len(like), -1)
    near = like.new_zeros(len(like), len(like))
    if causal:
        near = near.fill_(-math.inf).triu_(1)
    return torch.cat([far, near], 1)
