"""k-means for many groups at once, on the nearest-codeword op."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

import astra_kernels as ak


def kmeans(
    vectors: Tensor,
    codewords: int,
    *,
    iterations: int = 8,
    seed: int = 0,
) -> Tensor:
    """Codewords that minimize the squared error of `vectors`.

    Args:
        vectors: fp32 [n, C, w]; group c has its own codebook.
        codewords: K ≤ n.

    Returns:
        fp32 [C, K, w]; the same for the same seed and number of torch threads.

    Starts with k-means‖ (Bahmani et al. 2012): in a few rounds, vectors are drawn with probability
    proportional to their squared distance from what was drawn before. Each Lloyd iteration moves
    dead codewords to vectors with a large error.
    """
    count, groups, _ = vectors.shape
    if not 1 <= codewords <= count:
        raise ValueError(
            f"codewords: expected at most as many as calibration vectors, {count}, got {codewords}"
        )
    generator = torch.Generator(vectors.device).manual_seed(seed)
    centers = _initial(vectors, codewords, generator)
    for _ in range(iterations):
        codes = ak.encode(vectors, centers).long()  # [n, C]
        sums = torch.zeros_like(centers)
        members = torch.zeros(groups, codewords, device=vectors.device)
        error = (vectors - ak.decode(codes.int(), centers)).square().sum(-1)  # [n, C]
        for c in range(groups):
            sums[c].index_add_(0, codes[:, c], vectors[:, c])
            members[c] = torch.bincount(codes[:, c], minlength=codewords)
        centers = sums / members.clamp(min=1)[..., None]
        for c in range(groups):
            dead = (members[c] == 0).nonzero().flatten()
            if len(dead):
                centers[c, dead] = vectors[draw(error[:, c], len(dead), generator), c]
    return centers


def draw(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different indices, each drawn with probability proportional to its weight."""
    # The `count` smallest of Exp(1)/weight are such a draw; zero weights come last.
    wait = torch.empty_like(weight).exponential_(generator=generator) / weight.clamp(min=1e-30)
    return wait.topk(count, largest=False).indices


def _initial(vectors: Tensor, codewords: int, generator: torch.Generator) -> Tensor:
    rounds = 6
    count, groups, width = vectors.shape
    chosen = torch.empty(groups, codewords, width, device=vectors.device)
    distance = torch.ones(count, groups, device=vectors.device)
    bounds = [codewords * r // rounds for r in range(rounds + 1)]
    for low, high in pairwise(bounds):
        if low == high:
            continue
        for c in range(groups):
            chosen[c, low:high] = vectors[draw(distance[:, c], high - low, generator), c]
        fresh = chosen[:, low:high].contiguous()
        nearest = ak.decode(ak.encode(vectors, fresh), fresh)
        step = (vectors - nearest).square().sum(-1)
        distance = step if low == 0 else torch.minimum(distance, step)
    return chosen
