"""Nearest codeword, slow and obvious: the exact meaning of ``encode``."""

from __future__ import annotations

import torch
from torch import Tensor


def encode(vectors: Tensor, codebook: Tensor, half_norms: Tensor | None = None) -> Tensor:
    """argmin_k ||x - c_k||^2 from the differences, in fp32 (fp64 where an input is fp64).

    Norms are of no use to differences; the argument is there as every implementation has it.
    """
    double = torch.float64 in (vectors.dtype, codebook.dtype)
    dtype = torch.float64 if double else torch.float32
    codes = torch.empty(vectors.shape[:-1], dtype=torch.int32, device=vectors.device)
    for group in range(codebook.shape[0]):
        codewords = codebook[group].to(dtype)
        count = codes[..., group].numel()
        rows = vectors[..., group, :].reshape(count, vectors.shape[-1]).to(dtype)
        nearest = [squared_distances(row, codewords).argmin() for row in rows]
        if nearest:
            codes[..., group] = torch.stack(nearest).view(vectors.shape[:-2]).to(torch.int32)
    return codes


def squared_distances(vector: Tensor, codewords: Tensor) -> Tensor:
    """[w] to [K, w] gives [K]; a distance that is not a number counts as infinite."""
    distances = (codewords - vector).square().sum(dim=-1)
    return distances.nan_to_num(nan=float("inf"), posinf=float("inf"))
