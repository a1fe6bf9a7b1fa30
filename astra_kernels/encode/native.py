"""Nearest codeword on a CPU in C++: products and minimum in one loop, scores never written."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _C


def encode(vectors: Tensor, codebook: Tensor, half_norms: Tensor | None = None) -> Tensor:
    """As `astra_kernels.encode`, in fp32. `half_norms` are computed anew, which costs nothing."""
    if torch.float64 in (vectors.dtype, codebook.dtype):
        raise RuntimeError(
            "astra_kernels.encode: impl='native' cannot run: the C++ kernel takes float32, float16 "
            "and bfloat16, not float64; impl='auto' takes what there is"
        )
    groups, codewords, width = codebook.shape
    if not vectors.numel():
        return vectors.new_zeros(vectors.shape[:-1], dtype=torch.int32)
    table = codebook.detach().float().contiguous()
    rows = vectors.detach().reshape(-1, groups, width).float().contiguous()
    codes = torch.empty(vectors.shape[:-1], dtype=torch.int32, device="cpu")
    _C.encode(
        rows.data_ptr(),
        table.data_ptr(),
        rows.shape[0],
        groups,
        codewords,
        width,
        codes.data_ptr(),
        torch.get_num_threads(),
    )
    return codes
