"""Rotary positions, rotate-half convention, and their inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _elementwise as elementwise

Rope = tuple[Tensor, Tensor] | None  # cos and sin, [B, N, d]


def rotate(keys: Tensor, rope: Rope, out: Tensor | None = None) -> Tensor:
    """Rotary positions, rotate-half convention: keys [B, H, N, d] by cos and sin [B, N, d].

    out: to write to, like `keys`; None: a new tensor, or `keys` themselves without a rotation.
    """
    if rope is None:
        return keys if out is None else out.copy_(keys)
    cos, sin = (t.to(keys.dtype) for t in rope)
    return elementwise.rotate(keys, cos, sin, out)


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
