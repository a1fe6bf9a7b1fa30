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
    if torch.is_grad_enabled():
        return keys * cos + torch.cat([-second, first], -1) * sin
    # the same sums, in fewer passes over memory
    rotated, half = keys * cos, first.shape[-1]
    turned = second * sin[..., :half]
    rotated[..., :half].sub_(turned)
    rotated[..., half:].add_(torch.mul(first, sin[..., half:], out=turned))
    return rotated


def unrotate(keys: Tensor, rope: Rope) -> Tensor:
    """The inverse of `rotate`: the rotation by the negative angle, over its squared length."""
    return keys if rope is None else rotate(keys, inverse(rope, keys.dtype))


def inverse(rope: Rope, dtype: torch.dtype) -> Rope:
    """Angles by which `rotate` undoes the rotation by `rope`."""
    if rope is None:
        return None
    cos, sin = (t.to(dtype) for t in rope)  # of fewer bits, they have to be undone exactly
    norm = cos * cos + sin * sin
    return cos / norm, -sin / norm
