"""Rotary positions on dense keys, the rotate-half way: the one place that has them in torch."""

from __future__ import annotations

from torch import Tensor

Rope = tuple[Tensor, Tensor]


def apply_rope(key: Tensor, rope: Rope) -> Tensor:
    """key * cos + rotate_half(key) * sin, which pairs channel i with i + d/2; differentiable.

    Args:
        key: [..., Hkv, N, d]; d is even.
        rope: (cos, sin), each [N, d] or [B, N, d], taken in key's dtype.

    Returns:
        A new tensor of key's shape and dtype.
    """
    cos, sin = (table.to(key.dtype).unsqueeze(-3) for table in rope)
    half = key.shape[-1] // 2
    rotated = key * cos
    rotated[..., :half].addcmul_(key[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(key[..., :half], sin[..., half:])
    return rotated
