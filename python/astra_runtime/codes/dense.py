"""Dense exchange: the keys and values themselves, exact or in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from astra_kernels import _direct as direct

from ..models import Adapter
from .base import Bytes, Codec, CodeCosts, Payload, TokenBits, as_tensor, key_value_width
from .fields import CodebookFields
from .rotary import Rope
from .simulated import Pair, Quantize, SentTokens, SimulatedCodec
from .staging import stays_packed


@dataclass(frozen=True, eq=False)
class DenseTokens:
    """Remote keys (rotated) and values, [B, Hkv, N, d].

    rough: so much is left out of them that attention may round them to bf16, where products are
    quicker so.
    """

    key: Tensor
    value: Tensor
    rough: bool = False


class DenseAttention(Codec):
    """Attention over keys and values that this rank has as tensors."""

    def attend(
        self, block: int, query: Tensor, remote: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        return direct.attention(
            query, remote.key, remote.value, key_mask=mask, scale=scale, rounded=remote.rough
        )

    def tensors(self, block: int, remote: Any, rope: Rope) -> tuple[Tensor, Tensor]:
        return remote.key, remote.value


def int8(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., d] in 8 bits: int8 codes, and an fp16 step a vector, [..., 1]."""
    step = (vectors.abs().amax(-1, keepdim=True) / 127).to(torch.float16)
    codes = (vectors / step.clamp(min=2**-24)).round().clamp(-127, 127)
    return codes.to(torch.int8), step


class DenseExchange(DenseAttention):
    """Every rank receives the keys and values: exact in float32, a strong baseline in int8."""

    key = "none"
    coded = False
    keeps_sessions = True

    def __init__(self, codebook: CodebookFields, adapter: Adapter) -> None:
        self.dtype: torch.dtype = getattr(torch, codebook.dtype)
        self.model_dtype, self.device = adapter.dtype, adapter.device
        self.payload_device = self.device if stays_packed(self.device) else None
        self.heads, self.head_dim = adapter.num_key_value_heads, adapter.head_dim

    @classmethod
    def token_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int], block: int) -> float:
        bits = 8.0 * getattr(torch, codebook.dtype).itemsize
        if codebook.dtype == "int8":
            bits += 16.0 / sizes["head_dim"]  # an fp16 step a vector
        return key_value_width(sizes) * bits

    @classmethod
    def costs(cls, codebook: CodebookFields, adapter: Adapter) -> CodeCosts:
        return CodeCosts()

    @classmethod
    def simulate(
        cls, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> SimulatedCodec:
        return _Simulated(codebook, adapter, quantize, receivers)

    @classmethod
    def trainable(cls, codebook: CodebookFields) -> bool:
        return codebook.dtype == "float32"

    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        vectors = 2 * batch * self.heads * tokens
        step = 2 if self.dtype == torch.int8 else 0  # an fp16 step a vector
        return vectors * (self.head_dim * self.dtype.itemsize + step)

    def token_layout(self, block: int, batch: int, tokens: int) -> list[TokenBits]:
        """Keys, then values, each [B, Hkv, T, d]; behind them int8's steps, [2, B, Hkv, T]."""
        layout, start = [], 0
        for size in (self.head_dim * self.dtype.itemsize, 2 if self.dtype == torch.int8 else 0):
            for number in range(2 * batch * self.heads if size else 0):
                layout.append(TokenBits(start, 8 * size, number // self.heads % batch))
                start += size * tokens
        return layout

    def encode(self, block: int, what: Any, rope: Rope, out: Bytes) -> None:
        pair = torch.stack(what)  # [2, B, Hkv, T, d]
        flat = as_tensor(out)
        if self.dtype != torch.int8:
            largest = torch.finfo(self.dtype).max  # a few massive activations exceed fp16
            fitting = pair.float().clamp(-largest, largest).to(flat.device, self.dtype)
            flat.copy_(fitting.contiguous().view(-1).view(torch.uint8))
            return
        codes, step = int8(pair)
        size = codes.numel()
        flat[:size].copy_(codes.view(-1).view(torch.uint8))
        flat[size:].copy_(step.view(-1).view(torch.uint8))

    def _pair(self, payload: Payload, batch: int) -> Tensor:
        flat = as_tensor(payload.view).to(self.device, copy=True)
        shape, first = (2, batch, self.heads, payload.tokens), slice(payload.num_received)
        if self.dtype != torch.int8:
            pair = flat.view(self.dtype).view(*shape, self.head_dim)
            return pair[..., first, :].to(self.model_dtype)
        size = flat.numel() * self.head_dim // (self.head_dim + 2)
        codes, step = flat[:size].view(torch.int8), flat[size:].view(torch.float16)
        pair = codes.view(*shape, self.head_dim).float() * step.view(*shape, 1)
        return pair[..., first, :].to(self.model_dtype)

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> DenseTokens:
        key, value = torch.cat([self._pair(p, batch) for p in payloads], 3)
        return DenseTokens(key, value)


class _Simulated(SimulatedCodec):
    def remote_pairs(self, block: int, sent: SentTokens, received: Tensor | None) -> list[Pair]:
        pair = torch.stack([sent.key, sent.value])
        if self.codebook.dtype == "int8":
            codes, step = int8(pair)
            pair = codes * step.to(pair.dtype)
        elif self.codebook.dtype == "float16":
            pair = pair.half().to(pair.dtype)
        return [(pair[0], pair[1])]
