"""k-means for many groups at once, on the nearest-codeword op."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

import astra_kernels as ak

WHOLE = 2  # iterations at the end that look at all vectors


def kmeans(
    vectors: Tensor,
    codewords: int,
    *,
    iterations: int = 8,
    seed: int = 0,
    thin: int = 1,
    rounds: int = 6,
) -> Tensor:
    """Codewords that minimize the squared error of `vectors`.

    Args:
        vectors: fp32 [n, C, w]; group c has its own codebook.
        codewords: K ≤ n.
        thin: the start and all iterations but the last two look at one vector in `thin` only, each
            iteration at others; n/thin is at least K.
        rounds: of drawing the codewords to start with.

    Returns:
        fp32 [C, K, w]; the same for the same seed and number of torch threads.

    Starts with k-means‖ (Bahmani et al. 2012): in a few rounds, vectors are drawn with probability
    proportional to their squared distance from what was drawn before. Each Lloyd iteration moves
    dead codewords to vectors with a large error.
    """
    count = len(vectors)
    if not 1 <= codewords <= count:
        raise ValueError(
            f"codewords: expected at most as many as calibration vectors, {count}, got {codewords}"
        )
    generator = torch.Generator(vectors.device).manual_seed(seed)
    parts = [vectors[start::thin].contiguous() for start in range(thin)]
    centers = _initial(parts[0], codewords, generator, rounds)
    for iteration in range(iterations):
        last = iteration >= iterations - WHOLE
        part = vectors if last else parts[(iteration + 1) % thin]
        centers = _moved(part, centers, generator)
    return centers


def _moved(vectors: Tensor, centers: Tensor, generator: torch.Generator) -> Tensor:
    """Every codeword at the mean of its members, or, without any, at a vector far from its own."""
    groups, codewords, width = centers.shape
    codes = ak.encode(vectors, centers).long()  # [n, C]
    flat = codes + codewords * torch.arange(groups, device=codes.device)
    flat = flat.flatten()
    sums = torch.zeros_like(centers).view(-1, width)
    sums.index_add_(0, flat, vectors.reshape(-1, width))
    members = torch.bincount(flat, minlength=groups * codewords).view(groups, codewords)
    means = sums.view_as(centers) / members.clamp(min=1)[..., None]
    for c in (members == 0).any(1).nonzero().flatten().tolist():
        dead = (members[c] == 0).nonzero().flatten()
        of_group = vectors[:, c]
        error = (of_group - centers[c, codes[:, c]]).square().sum(-1)
        means[c, dead] = of_group[draw(error, len(dead), generator)]
    return means


def draw(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different indices, each drawn with probability proportional to its weight."""
    # The `count` smallest of Exp(1)/weight are such a draw; zero weights come last.
    wait = torch.empty_like(weight).exponential_(generator=generator) / weight.clamp(min=1e-30)
    return wait.topk(count, largest=False).indices


def _initial(vectors: Tensor, codewords: int, generator: torch.Generator, rounds: int) -> Tensor:
    count, groups, width = vectors.shape
    chosen = vectors.new_empty(groups, codewords, width)
    distance = vectors.new_ones(count, groups)
    bounds = [codewords * r // rounds for r in range(rounds + 1)]
    for low, high in pairwise(bounds):
        if low == high:
            continue
        for c in range(groups):
            chosen[c, low:high] = vectors[draw(distance[:, c], high - low, generator), c]
        if high == codewords:
            break
        fresh = chosen[:, low:high].contiguous()
        nearest = ak.decode(ak.encode(vectors, fresh), fresh)
        step = (vectors - nearest).square().sum(-1)
        distance = step if low == 0 else torch.minimum(distance, step)
    return chosen
