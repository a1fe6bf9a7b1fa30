"""Counting codes, slow and obvious: one position of one batch row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def count_codes(codes: Tensor, codewords: int, *, code_mask: Tensor | None = None) -> Tensor:
    batch, _, codes_per_token = codes.shape
    counts = codes.new_zeros((batch, codes_per_token, codewords), dtype=torch.int32)
    for row in range(batch):
        seen = codes[row] if code_mask is None else codes[row][code_mask[row]]
        for place in range(codes_per_token):
            counts[row, place] = torch.bincount(seen[:, place], minlength=codewords)
    return counts
