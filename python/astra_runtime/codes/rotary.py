"""Rotary positions, rotate-half convention, and their inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor] | None  # cos and sin, [B, N, d]


class ConsecutiveAngles(NamedTuple):
    """Cos and sin of tokens whose positions follow on each other: `rope_consecutive` holds."""

    cos: Tensor
    sin: Tensor


def rotate(keys: Tensor, rope: Rope) -> Tensor:
    """Rotary positions, rotate-half convention: keys [B, H, N, d] by cos and sin [B, N, d]."""
    if rope is None:
        return keys
    cos, sin = (t.to(keys.dtype).unsqueeze(1) for t in rope)
    first, second = keys.chunk(2, -1)
    return keys * cos + torch.cat([-second, first], -1) * sin


def unrotate(keys: Tensor, rope: Rope) -> Tensor:
    """The inverse of `rotate`: the rotation by the negative angle, over its squared length."""
    if rope is None:
        return keys
    cos, sin = (t.to(keys.dtype) for t in rope)  # of fewer bits, they have to be undone exactly
    norm = cos * cos + sin * sin
    return rotate(keys, (cos / norm, -sin / norm))
