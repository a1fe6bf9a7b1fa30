"""Encoding by the CPU's path, packing by the C++ core."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _C
from astra_kernels.encode import cpu as encode_cpu


def encode_packed(
    vectors: Tensor, codebook: Tensor, code_bits: int, half_norms: Tensor | None = None
) -> Tensor:
    """vectors [B, N, C, w], codebook [C, K, w] -> uint8 [B, ceil(N*C*code_bits/8)]."""
    codes = encode_cpu.encode(vectors, codebook, half_norms)
    count = codes.shape[1] * codes.shape[2]
    packed = torch.empty(
        (codes.shape[0], (count * code_bits + 7) // 8), dtype=torch.uint8, device="cpu"
    )
    for row, target in zip(codes, packed, strict=True):
        _C.pack((row.data_ptr(), count), code_bits, (target.data_ptr(), target.numel()))
    return packed
