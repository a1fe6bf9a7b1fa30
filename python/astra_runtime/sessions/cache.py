"""Keys and values of a sequence's first tokens on one rank: they grow, are forked and are cut."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

import astra_kernels as ak

from ..trace import stage

_SPARE = 64  # tokens of free room that a new buffer has at least


class _Buffer:
    """Room for keys and values of one block, [1, Hkv, capacity, d] each.

    Attributes:
        filled: how many tokens anybody has written.
        shared: forks may read what lies below `filled`.
    """

    __slots__ = ("filled", "key", "shared", "value")

    def __init__(self, key: Tensor, value: Tensor, capacity: int) -> None:
        shape = (1, key.shape[1], capacity, key.shape[3])
        self.key, self.value = key.new_empty(shape), value.new_empty(shape)
        self.filled, self.shared = 0, False


class KeyValues:
    """Keys (rotated) and values of each block.

    A buffer is written behind what it holds, in place. After a fork whoever writes first goes on in
    place, and the other copies, at its first write.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._buffers: list[_Buffer | None] = [None] * blocks
        self._lengths = [0] * blocks

    @property
    def length(self) -> int:
        """Tokens of which every block has keys and values."""
        return min(self._lengths)

    def tensors(self, block: int, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [1, Hkv, stop − start, d] of one block; they are views."""
        buffer, stop = self._buffers[block], self._lengths[block] if stop is None else stop
        assert buffer is not None, "nothing has been appended"
        return buffer.key[:, :, start:stop], buffer.value[:, :, start:stop]

    def append(self, block: int, key: Tensor, value: Tensor) -> None:
        """Adds those of further tokens, [1, Hkv, n, d] each."""
        start = self._lengths[block]
        stop = start + key.shape[2]
        if stop == start:
            return
        buffer = self._writable(block, stop, key, value)
        buffer.key[:, :, start:stop] = key
        buffer.value[:, :, start:stop] = value
        buffer.filled = self._lengths[block] = stop

    def attend(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Adds new tokens, and attends from them, [1, H, M, d], to all so far: (out, lse)."""
        self.append(block, key, value)
        with stage("attend", block):
            return ak.attention(query, *self.tensors(block), is_causal=True, scale=scale)

    def _writable(self, block: int, stop: int, key: Tensor, value: Tensor) -> _Buffer:
        buffer, start = self._buffers[block], self._lengths[block]
        fits = buffer is not None and stop <= buffer.key.shape[2]
        if buffer is not None and fits and (buffer.filled == start or not buffer.shared):
            return buffer
        wider = _Buffer(key, value, stop + max(_SPARE, stop // 4))
        if buffer is not None:
            wider.key[:, :, :start] = buffer.key[:, :, :start]
            wider.value[:, :, :start] = buffer.value[:, :, :start]
        self._buffers[block] = wider
        return wider

    def truncate(self, length: int) -> None:
        """Keeps at most the first `length` tokens."""
        self._lengths = [min(length, held) for held in self._lengths]

    def fork(self) -> Self:
        other = type(self)(len(self._buffers))
        for buffer in self._buffers:
            if buffer is not None:
                buffer.shared = True
        other._buffers, other._lengths = list(self._buffers), list(self._lengths)
        return other

    def slices(self, intervals: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """Of each block, copies of the keys and values of these tokens, side by side."""
        held = []
        for block in range(len(self._buffers)):
            pairs = [self.tensors(block, start, stop) for start, stop in intervals]
            key, value = (torch.cat(parts, 2) for parts in zip(*pairs, strict=True))
            held.append((key, value))
        return held
