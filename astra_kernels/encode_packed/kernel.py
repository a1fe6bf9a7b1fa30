"""Nearest codewords on a GPU, packed while the splits of the search are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels._triton.tiles import Tile
from astra_kernels.encode.kernel import run_finish, search_in_splits


def encode_packed(
    vectors: Tensor,
    codebook: Tensor,
    code_bits: int,
    half_norms: Tensor | None = None,
    *,
    splits: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """vectors [B, N, C, w] -> uint8 [B, ceil(N*C*code_bits/8)]; see ``encode.kernel.encode``."""
    batch, tokens, groups, _ = vectors.shape
    size = (tokens * groups * code_bits + 7) // 8
    data = vectors.new_empty((batch, size), dtype=torch.uint8)
    if vectors.numel() == 0:
        return data.zero_()
    scores, codes = search_in_splits(vectors, codebook, half_norms, splits, tile)
    run_finish(scores, codes, data, code_bits)
    return data
