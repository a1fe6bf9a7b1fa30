"""Any number of partial softmaxes become one, slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(lses, dim=0)
    lse = lse.masked_fill((lses == float("inf")).any(dim=0), float("nan"))
    out = torch.zeros(outs.shape[1:], dtype=lses.dtype, device=outs.device)
    for part, part_lse in zip(outs, lses, strict=True):
        empty = part_lse == float("-inf")  # a state without keys has no say
        shift = lse.masked_fill(empty, 0.0)
        weight = torch.exp(part_lse - shift).unsqueeze(-1)
        clean = part.to(lses.dtype).masked_fill(empty.unsqueeze(-1), 0.0)
        out = out + weight * clean
    return out.to(outs.dtype), lse
