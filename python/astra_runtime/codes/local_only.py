"""The local-only control: no rank receives anything of another's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..models import Adapter
from .base import Bytes, Codec, CodeCosts, Payload, TokenBits
from .fields import CodebookFields
from .rotary import Rope
from .simulated import Quantize, SimulatedCodec


class LocalOnly(Codec):
    key = "drop"
    coded = False
    sends = False

    def __init__(self, codebook: CodebookFields, adapter: Adapter) -> None:
        pass

    @classmethod
    def token_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int], block: int) -> float:
        return 0

    @classmethod
    def costs(cls, codebook: CodebookFields, adapter: Adapter) -> CodeCosts:
        return CodeCosts(attended=False)

    @classmethod
    def simulate(
        cls, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> SimulatedCodec:
        raise AssertionError("nothing is sent")

    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        return 0

    def token_layout(self, block: int, batch: int, tokens: int) -> list[TokenBits]:
        return []

    def encode(self, block: int, what: Any, rope: Rope, out: Bytes) -> None:
        raise AssertionError("nothing is sent")

    def decode(self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope) -> None:
        return None

    def attend(
        self, block: int, query: Tensor, remote: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        raise AssertionError("nothing is attended to")
