"""Codes back to vectors in Triton: one head without rotary positions, whose groups are its own."""

from __future__ import annotations

from torch import Tensor

from astra_kernels._triton.expand import expand


def decode(codes: Tensor, codebook: Tensor) -> Tensor:
    groups, _, width = codebook.shape
    tokens = codes.numel() // max(groups, 1)
    vectors = expand(
        codes.reshape(1, tokens, groups),
        codebook[None, None],
        1,
        tokens,
        shared=True,
        code_bits=None,
        dtype=codebook.dtype,
    )
    return vectors.view(*codes.shape, width)
