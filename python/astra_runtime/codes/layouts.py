"""Keys and values as the vectors that are coded, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .rotary import Rope, rotate


def split_groups(key: Tensor, value: Tensor, scales: Tensor, groups: int, shared: bool) -> Tensor:
    """Keys and values [B, Hkv, T, d] as the vectors that are coded, [B, T, C, w].

    Group s of a head takes channels s·d/S to (s + 1)·d/S of its key and of its value, scaled; with
    `shared`, group s takes these channels of all heads together.
    """
    heads = key.shape[1]
    parts = groups if shared else groups // heads
    pair = torch.stack([key * scales[:, 0, None, None], value * scales[:, 1, None, None]], 3)
    pair = pair.unflatten(-1, (parts, -1))  # [B, Hkv, T, 2, S, d/S]
    if shared:
        return pair.permute(0, 2, 4, 1, 3, 5).flatten(3)
    return pair.permute(0, 2, 1, 4, 3, 5).flatten(4).flatten(2, 3)


def merge_groups(
    vectors: Tensor, scales: Tensor, heads: int, shared: bool
) -> tuple[Tensor, Tensor]:
    """The inverse of `split_groups`: [B, T, C, w] -> keys and values [B, Hkv, T, d]."""
    if shared:
        pair = vectors.unflatten(-1, (heads, 2, -1)).permute(0, 3, 1, 4, 2, 5)
    else:
        pair = vectors.unflatten(-1, (2, -1)).unflatten(2, (heads, -1)).permute(0, 2, 1, 4, 3, 5)
    pair = pair.flatten(4) / scales[:, None, :, None]  # [B, Hkv, T, 2, d]
    return pair[..., 0, :], pair[..., 1, :]


def split_tables(table: Tensor, scales: Tensor, heads: int, shared: bool) -> tuple[Tensor, Tensor]:
    """The same for one block's codewords: [C, K, w] -> key and value tables [Hkv, S, K, d/S]."""
    if shared:
        pair = table.unflatten(-1, (heads, 2, -1)).permute(2, 0, 1, 3, 4)
    else:
        pair = table.unflatten(-1, (2, -1)).unflatten(0, (heads, -1))
    pair = pair / scales[:, None, None, :, None]
    return pair[..., 0, :].contiguous(), pair[..., 1, :].contiguous()


def merge_heads(key: Tensor, value: Tensor) -> Tensor:
    """Keys and values [B, Hkv, T, d] as y, [B, T, E]: all keys, then all values."""
    return torch.cat([key, value], 1).transpose(1, 2).flatten(2)


def merge_rotated(key: Tensor, value: Tensor, rope: Rope) -> Tensor:
    """The same in fp32, of keys that are rotated on the way."""
    if torch.is_grad_enabled():
        return merge_heads(rotate(key.float(), rope), value.float())
    batch, heads, tokens, width = key.shape
    both = torch.empty(batch, tokens, 2 * heads, width, dtype=torch.float32, device=key.device)
    keys, values = both.transpose(1, 2).split(heads, 1)
    rotate(key.float(), rope, keys)
    values.copy_(value)
    return both.flatten(2)


def split_heads(y: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The inverse of `merge_heads`."""
    both = y.unflatten(-1, (2 * heads, -1)).transpose(1, 2)
    return both[:, :heads], both[:, heads:]
