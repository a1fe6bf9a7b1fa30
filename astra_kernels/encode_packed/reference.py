"""Encoding and packing one after the other: the exact meaning of ``encode_packed``."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels.encode import reference as encode_reference


def encode_packed(
    vectors: Tensor, codebook: Tensor, code_bits: int, half_norms: Tensor | None = None
) -> Tensor:
    """vectors [B, N, C, w], codebook [C, K, w] -> uint8 [B, ceil(N*C*code_bits/8)]."""
    from astra_kernels.pack import reference as pack_reference  # which imports what imports this

    codes = encode_reference.encode(vectors, codebook, half_norms)
    size = (codes.shape[1] * codes.shape[2] * code_bits + 7) // 8
    packed = torch.empty((codes.shape[0], size), dtype=torch.uint8, device=codes.device)
    for target, row in zip(packed, codes, strict=True):
        target.copy_(pack_reference.pack(row, code_bits))
    return packed
