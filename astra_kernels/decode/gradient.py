"""The gradient of looking codewords up: each codeword's is the sum over its vectors."""

from __future__ import annotations

from torch import Tensor

from astra_kernels.coded_attention.gradient import add_rows, rows_of


def decode(grad: Tensor, codes: Tensor, codewords: int) -> Tensor:
    """grad [..., C, w], codes [..., C] -> that to the codebook [C, K, w], in fp32 (fp64)."""
    groups, width = grad.shape[-2:]
    wide = grad if grad.dtype.itemsize > 4 else grad.float()
    table = wide.new_zeros((1, 1, groups, codewords, width))
    flat = codes.reshape(1, -1, groups)
    index = rows_of(flat, table, None)
    add_rows(table, index, wide.reshape(1, 1, -1, groups * width))
    return table[0, 0]
