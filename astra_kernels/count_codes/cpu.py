"""Counting codes on a CPU: one count over all batch rows and positions, each with its own range."""

from __future__ import annotations

import torch
from torch import Tensor


def count(codes: Tensor, codewords: int, code_mask: Tensor | None = None) -> Tensor:
    """codes [B, N, C], mask [B, N] -> how often each codeword occurs, int64 [B, C, K]."""
    batch, _, codes_per_token = codes.shape
    bins = batch * codes_per_token * codewords
    first = torch.arange(0, bins, codewords, device=codes.device).view(batch, 1, codes_per_token)
    index = codes + first
    if code_mask is not None:
        index = index[code_mask]
    counts = torch.bincount(index.reshape(-1), minlength=bins)
    return counts.view(batch, codes_per_token, codewords)


def count_codes(codes: Tensor, codewords: int, *, code_mask: Tensor | None = None) -> Tensor:
    return count(codes, codewords, code_mask).to(torch.int32)
