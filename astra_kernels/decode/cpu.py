"""Codes back to vectors on a CPU: one row gather over all groups."""

from __future__ import annotations

import torch
from torch import Tensor


def decode(codes: Tensor, codebook: Tensor) -> Tensor:
    groups, codewords, width = codebook.shape
    first_rows = torch.arange(0, groups * codewords, codewords, device="cpu")
    index = (codes + first_rows).reshape(-1)
    vectors = codebook.reshape(groups * codewords, width).index_select(0, index)
    return vectors.view(*codes.shape, width)
