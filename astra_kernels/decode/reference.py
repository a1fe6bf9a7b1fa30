"""Codes back to vectors, slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor


def decode(codes: Tensor, codebook: Tensor) -> Tensor:
    groups = [codebook[group][codes[..., group].long()] for group in range(codebook.shape[0])]
    return torch.stack(groups, dim=-2)
