"""Products of dequantized weights: the exact meaning of ``quantized_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 2.0**-119  # groups of smaller values are zeros: 127 over one might be infinite


def dequantized(weight: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """fp32 [N, K] of int8 [N, K] or uint8 [N, K/2]; scale and minimum [N, G]."""
    if weight.dtype == torch.uint8:
        weight = torch.stack([weight & 15, weight >> 4], -1).flatten(1)
    grouped = weight.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]
    if minimum is not None:
        grouped = grouped + minimum.float()[..., None]
    return grouped.flatten(1)


def rounded(vectors: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """fp32 [..., K] -> integers of 8 bits as fp32 [..., G, K/G], and their steps [..., G, 1]."""
    grouped = vectors.unflatten(-1, (groups, -1))
    largest = grouped.abs().amax(-1, keepdim=True)
    # a tensor over a tensor: a number over one would be a product with its reciprocal
    inverse = torch.where(largest < LEAST, 0.0, torch.full_like(largest, 127) / largest)
    return (grouped * inverse).round(), largest / 127


def quantized_linear(
    vectors: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None
) -> Tensor:
    integers, step = rounded(vectors.float(), scale.shape[1])
    out = (integers * step).flatten(-2) @ dequantized(weight, scale, minimum).T
    return (out if bias is None else out + bias.float()).to(vectors.dtype)
