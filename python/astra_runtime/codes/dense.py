"""Dense exchange, exact or in 8 bits, and the control that exchanges nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak

from ..models import Adapter
from .base import Payload, Space, Strip
from .rotary import Rope


@dataclass(frozen=True)
class DenseTokens:
    """Remote keys (rotated) and values, [B, Hkv, N, d]."""

    key: Tensor
    value: Tensor


class DenseAttention(Space):
    """Attention over keys and values that this rank has as tensors."""

    def attend(
        self, block: int, query: Tensor, kept: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        return ak.attention(query, kept.key, kept.value, key_mask=mask, scale=scale)


def int8(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., d] in 8 bits: int8 codes, and an fp16 step a vector, [..., 1]."""
    step = (vectors.abs().amax(-1, keepdim=True) / 127).to(torch.float16)
    codes = (vectors / step.clamp(min=2**-24)).round().clamp(-127, 127)
    return codes.to(torch.int8), step


class Dense(DenseAttention):
    """The keys and values themselves: exact in float32, a strong baseline in int8."""

    def __init__(self, dtype: str, adapter: Adapter) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.model_dtype, self.device = adapter.dtype, adapter.device
        self.heads, self.head_dim = adapter.num_key_value_heads, adapter.head_dim

    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        vectors = 2 * batch * self.heads * tokens
        step = 2 if self.dtype == torch.int8 else 0  # an fp16 step a vector
        return vectors * (self.head_dim * self.dtype.itemsize + step)

    def strips(self, block: int, batch: int, tokens: int) -> list[Strip]:
        """Keys, then values, each [B, Hkv, T, d]; behind them int8's steps, [2, B, Hkv, T]."""
        found, start = [], 0
        for size in (self.head_dim * self.dtype.itemsize, 2 if self.dtype == torch.int8 else 0):
            for number in range(2 * batch * self.heads if size else 0):
                found.append(Strip(start, 8 * size, number // self.heads % batch))
                start += size * tokens
        return found

    def encode(self, block: int, what: Any, rope: Rope, out: memoryview) -> None:
        pair = torch.stack(what)  # [2, B, Hkv, T, d]
        flat = torch.frombuffer(out, dtype=torch.uint8)
        if self.dtype != torch.int8:
            top = torch.finfo(self.dtype).max  # a few massive activations exceed fp16
            fitting = pair.float().clamp(-top, top).to("cpu", self.dtype)
            flat.copy_(fitting.contiguous().view(-1).view(torch.uint8))
            return
        codes, step = int8(pair)
        cut = codes.numel()
        flat[:cut].copy_(codes.cpu().view(-1).view(torch.uint8))
        flat[cut:].copy_(step.cpu().view(-1).view(torch.uint8))

    def _one(self, payload: Payload, batch: int) -> Tensor:
        flat = torch.frombuffer(payload.view, dtype=torch.uint8).to(self.device, copy=True)
        shape, heard = (2, batch, self.heads, payload.tokens), slice(payload.num_received)
        if self.dtype != torch.int8:
            pair = flat.view(self.dtype).view(*shape, self.head_dim)
            return pair[..., heard, :].to(self.model_dtype)
        cut = flat.numel() * self.head_dim // (self.head_dim + 2)
        codes, step = flat[:cut].view(torch.int8), flat[cut:].view(torch.float16)
        pair = codes.view(*shape, self.head_dim).float() * step.view(*shape, 1)
        return pair[..., heard, :].to(self.model_dtype)

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> DenseTokens:
        key, value = torch.cat([self._one(p, batch) for p in payloads], 3)
        return DenseTokens(key, value)


class Nothing(Space):
    """The local-only control: no rank hears of another's tokens."""

    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        return 0

    def strips(self, block: int, batch: int, tokens: int) -> list[Strip]:
        return []

    def encode(self, block: int, what: Any, rope: Rope, out: memoryview) -> None:
        raise AssertionError("nothing is sent")

    def decode(self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope) -> None:
        return None

    def attend(
        self, block: int, query: Tensor, kept: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        raise AssertionError("nothing is attended to")
