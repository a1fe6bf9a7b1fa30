"""Look up, normalize, project; slow and obvious, differentiable in all but the codes."""

from __future__ import annotations

import torch
from torch import Tensor


def lookup_linear(
    codes: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    estimate: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """(y, None), or (y, x) with an estimate; in fp32, or fp64 where an input is fp64."""
    given = (codebook, weight, bias, estimate)
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in given)
    dtype = torch.float64 if double else torch.float32
    hidden = look_up(codes, codebook.to(dtype))
    if estimate is not None:
        hidden = (estimate.to(dtype) + hidden).to(estimate.dtype)
    y = normalize(hidden.to(dtype), norm, eps) @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(weight.dtype), None if estimate is None else hidden


def look_up(codes: Tensor, codebook: Tensor) -> Tensor:
    """codes [..., R*C] and codebook [R, C, K, w] or [C, K, w] to [..., C*w]."""
    stages = codebook if codebook.ndim == 4 else codebook.unsqueeze(0)
    codes = codes.long().unflatten(-1, stages.shape[:2])
    total = torch.zeros((), dtype=codebook.dtype, device=codebook.device)
    for stage, table in enumerate(stages):
        groups = [table[group][codes[..., stage, group]] for group in range(len(table))]
        total = total + torch.cat(groups, dim=-1)
    return total


def normalize(x: Tensor, norm: str | None, eps: float) -> Tensor:
    """RMS or layer norm over the last axis, without gain and shift."""
    if norm is None:
        return x
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps)
