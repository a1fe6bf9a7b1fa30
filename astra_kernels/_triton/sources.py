"""What the attention kernel attends to: dense keys, tokens known by codes, counted codewords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

State = tuple[Tensor, Tensor]


class Dense(NamedTuple):
    """Keys [B, Hkv, L, d] and values [B, Hkv, L, d_v] of query's dtype; mask bool [B, L] or None.

    ``attn_mask`` broadcasts to [B, H, M, L], bool or floats; ``window`` is (left, right).
    """

    key: Tensor
    value: Tensor
    is_causal: bool = False
    mask: Tensor | None = None
    attn_mask: Tensor | None = None
    window: Sequence[int] | None = None


class Coded(NamedTuple):
    """Tokens known by codes: integers [B, N, C], or with ``bits`` packed rows uint8 [B, bytes].

    Tables are [R, Hkv, S, K, d/S], those of values [R, Hkv, S, K, d_v/S]; ``shared`` says that all
    KV heads have one set of codes. ``attn_mask`` broadcasts to [B, H, M, N].
    """

    tokens: int
    codes: Tensor
    key_table: Tensor
    shared: bool
    value_codes: Tensor
    value_table: Tensor
    value_shared: bool
    bits: int | None = None
    rope: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    attn_mask: Tensor | None = None


class Counted(NamedTuple):
    """Codewords and how often they occur: counts [B, 1 or Hkv, K], tables [Hkv, 1, K, d or d_v]."""

    counts: Tensor
    key_table: Tensor
    value_table: Tensor


class Keys(NamedTuple):
    """All that one softmax is over: dense keys, coded or counted ones, or dense beside one of the
    others."""

    dense: Dense | None = None
    coded: Coded | None = None
    counted: Counted | None = None

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        if self.dense is not None:
            return self.dense.key.shape[1]
        if self.coded is not None:
            return self.coded.key_table.shape[1]
        assert self.counted is not None
        return self.counted.key_table.shape[0]

    @property
    def value_width(self) -> int:
        """d_v."""
        if self.dense is not None:
            return self.dense.value.shape[3]
        if self.coded is not None:
            return self.coded.value_table.shape[2] * self.coded.value_table.shape[4]
        assert self.counted is not None
        return self.counted.value_table.shape[3]

    @property
    def longest(self) -> int:
        """Keys of the longer source: it says into how many parts keys may be split."""
        return max(
            self.dense.key.shape[2] if self.dense is not None else 0,
            self.coded.tokens if self.coded is not None else 0,
            self.counted.key_table.shape[2] if self.counted is not None else 0,
        )

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """The tables of keys and of values, whose last axes are K and channels; none of dense ones
        alone."""
        remote = self.coded if self.coded is not None else self.counted
        return () if remote is None else (remote.key_table, remote.value_table)

    @property
    def masks(self) -> list[Tensor]:
        """Masks per query."""
        masks = [keys.attn_mask for keys in (self.dense, self.coded) if keys is not None]
        return [mask for mask in masks if mask is not None]
