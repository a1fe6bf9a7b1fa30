"""Which keys queries see, asked for block by block: what hides keys never becomes [M, L]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

HIDDEN = float("-inf")


@dataclass(frozen=True)
class Visibility:
    """A band around the bottom-right diagonal, a mask of keys, and one of scores.

    Row m of M stands at key p = L - M + m and sees keys p - left .. p + right (None: no limit).
    """

    rows: int
    tokens: int
    left: int | None = None
    right: int | None = None
    key_mask: Tensor | None = None  # bool [B, L]
    attn_mask: Tensor | None = None  # bool or float, four axes of full size or 1
    behind: int = 0  # keys that are left out behind these: L is tokens + behind

    @property
    def place(self) -> int:
        """Of these keys the one at which the first row stands; it may be before or behind them."""
        return self.tokens + self.behind - self.rows

    @property
    def open(self) -> bool:
        """Whether every row sees every key as it is."""
        return not self.banded and self.key_mask is None and self.attn_mask is None

    @property
    def causal(self) -> bool:
        """Whether a row sees all keys up to its own, as they are, and the last row the last key."""
        unmasked = self.key_mask is None and self.attn_mask is None and self.behind == 0
        return unmasked and self.right == 0 and self.left is None

    @property
    def banded(self) -> bool:
        return self.left is not None or self.right is not None

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The keys that rows start..stop can see, from the first to behind the last."""
        place = self.place
        low = 0 if self.left is None else max(0, place + start - self.left)
        high = self.tokens if self.right is None else place + stop + self.right
        high = max(0, min(self.tokens, high))
        return min(low, high), high

    def of_keys(self, low: int, high: int) -> Visibility:
        """The same of some of the keys alone."""
        mask = self.attn_mask
        if mask is not None and mask.shape[3] > 1:
            mask = mask[..., low:high]
        key_mask = None if self.key_mask is None else self.key_mask[:, low:high]
        behind = self.behind + self.tokens - high
        return replace(self, tokens=high - low, key_mask=key_mask, attn_mask=mask, behind=behind)

    def of_heads(self, batch: slice, heads: slice) -> Visibility:
        """The same of some batch rows and heads."""
        mask = None if self.attn_mask is None else of_heads(self.attn_mask, batch, heads)
        key_mask = None if self.key_mask is None else self.key_mask[batch]
        return replace(self, key_mask=key_mask, attn_mask=mask)

    def bias(
        self, start: int, stop: int, low: int, high: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """What is added to the scores of rows start..stop and keys low..high, -inf where hidden;
        of two or four axes, of full size or 1. None: nothing."""
        hidden = self._outside(start, stop, low, high, device)
        if self.key_mask is not None:
            masked = ~self.key_mask[:, None, None, low:high]
            hidden = masked if hidden is None else hidden | masked
        bias = self.attn_mask
        if bias is not None:
            bias = bias if bias.shape[2] == 1 else bias[:, :, start:stop]
            bias = bias if bias.shape[3] == 1 else bias[..., low:high]
            if bias.dtype == torch.bool:
                if hidden is None:
                    shown = torch.zeros((), dtype=dtype, device=device)
                    return torch.where(bias, shown, HIDDEN)
                hidden = hidden | ~bias
                bias = None
        if hidden is None:
            return None if bias is None else bias.to(dtype)
        if bias is None:
            bias = torch.zeros((), dtype=dtype, device=device)
        return torch.where(hidden, HIDDEN, bias.to(dtype))

    def _outside(
        self, start: int, stop: int, low: int, high: int, device: torch.device
    ) -> Tensor | None:
        """bool [rows, keys]: outside the band; None: none is."""
        place = self.place
        after = self.right is not None and high - 1 > place + start + self.right
        before = self.left is not None and low < place + stop - 1 - self.left
        if not after and not before:
            return None
        # Key minus place, of the block's first row and key.
        distance = torch.arange(low - place - start, high - place - start, device=device)
        distance = distance - torch.arange(stop - start, device=device).unsqueeze(1)
        hidden = torch.zeros((), dtype=torch.bool, device=device)
        if after and self.right is not None:
            hidden = hidden | (distance > self.right)
        if before and self.left is not None:
            hidden = hidden | (distance < -self.left)
        return hidden


def visibility(
    query: Tensor,
    tokens: int,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    window: Sequence[int] | None = None,
) -> Visibility:
    """What of a call's arguments hides a key; sides of the band that hide none are left out."""
    rows = query.shape[2]
    left, right = (None if side < 0 else side for side in window or (-1, -1))
    if is_causal:
        right = 0
    if left is not None and left >= tokens - 1:
        left = None
    if right is not None and right >= rows - 1:
        right = None
    if attn_mask is not None:
        attn_mask = _not_expanded(attn_mask)
    return Visibility(rows, tokens, left, right, key_mask, attn_mask)


def of_heads(mask: Tensor, batch: slice, heads: slice) -> Tensor:
    """Of a mask of four axes what some batch rows and heads see."""
    mask = mask[batch] if mask.shape[0] > 1 else mask
    return mask[:, heads] if mask.shape[1] > 1 else mask


def _not_expanded(mask: Tensor) -> Tensor:
    """Four axes; those that a view repeats are of size 1 again."""
    mask = mask[(None,) * (4 - mask.ndim)]
    for axis in range(4):
        if mask.stride(axis) == 0 and mask.shape[axis] > 1:
            mask = mask.narrow(axis, 0, 1)
    return mask
