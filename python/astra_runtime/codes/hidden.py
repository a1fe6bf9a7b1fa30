"""Codes of block inputs, channel group by channel group (the paper's)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak

from ..models import Adapter
from ..models.projection import Projection
from .base import Bytes, Codec, CodeCosts, Payload, Pending, projection_flops
from .dense import DenseAttention, DenseTokens
from .fields import CodebookFields
from .packed import PackedCodes, TableLookup, search_flops
from .rotary import Rope, rotate
from .simulated import Pair, Quantize, SentTokens, SimulatedCodec
from .staging import ReceivedCodes


class HiddenEncoder(PackedCodes):
    """The sender's side: channel groups of block inputs."""

    key = "hidden"
    early = True

    @classmethod
    def create(cls, codebook: CodebookFields, adapter: Adapter) -> Codec:
        return (ProjectedHiddenCodes if codebook.groups == 1 else HiddenCodes)(codebook, adapter)

    @classmethod
    def costs(cls, codebook: CodebookFields, adapter: Adapter) -> CodeCosts:
        """With one group the tables were projected when they were loaded."""
        receive = 0.0 if codebook.groups == 1 else projection_flops(adapter)
        return CodeCosts(search_flops(codebook, adapter.hidden_size), receive)

    @classmethod
    def simulate(
        cls, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> SimulatedCodec:
        return _Simulated(codebook, adapter, quantize, receivers)

    def encode(self, block: int, what: Any, rope: Rope, out: Bytes) -> Pending | None:
        return self.write_only(block, what.float().unflatten(-1, (self.groups, -1)), out)


class ProjectedHiddenCodes(HiddenEncoder, TableLookup):
    """Block inputs in one code a token: norm, W_K and W_V are applied to the codebook, once."""

    tabled = True

    def __init__(self, codebook: CodebookFields, adapter: Adapter) -> None:
        super().__init__(codebook, adapter)
        self.keys, self.values = [], []
        with torch.inference_mode():
            for block, table in enumerate(self.tables):
                key, value = adapter.project(block, table.to(adapter.dtype))  # [1, Hkv, K, d]
                self.keys.append(key.transpose(0, 1).contiguous())  # [Hkv, S=1, K, d]
                self.values.append(value.transpose(0, 1).contiguous())


class HiddenCodes(HiddenEncoder, DenseAttention):
    """Block inputs in G codes a token (the paper): the receiver projects the estimate itself."""

    def __init__(self, codebook: CodebookFields, adapter: Adapter) -> None:
        super().__init__(codebook, adapter)
        self.adapter = adapter
        self.projections: list[Projection | None] = [None] * len(self.tables)
        if self.staging is not None:
            self.projections = [adapter.projection(block) for block in range(len(self.tables))]
        self.tabled = any(projection is not None for projection in self.projections)

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> DenseTokens:
        projection = self.projections[block]
        if projection is not None:
            received = self.receive(block, payloads, batch)
            return self.look_up(block, received, projection, rope)[0]
        codes = self.read(block, payloads, batch)  # which checks them
        estimate = ak.decode(codes, self.tables[block], check=False).flatten(2)
        return self.project(block, estimate, rope)

    def look_up(
        self,
        block: int,
        codes: ReceivedCodes,
        projection: Projection,
        rope: Rope,
        estimate: Tensor | None = None,
    ) -> tuple[DenseTokens, Tensor | None]:
        """Keys and values straight from codes, of block inputs that are never written down.

        With an estimate [B, N, D] of them the codes refine it; it is returned as it is then.
        """
        options: dict[str, Any] = {"norm": projection.norm, "eps": projection.eps}
        if codes.joined:
            options |= {"code_bits": codes.bits, "num_tokens": codes.tokens}
        both: Any = ak.lookup_linear(
            codes.data if codes.joined else codes.unpacked(),
            self.tables[block],
            projection.weight,
            projection.bias,
            estimate=estimate,
            **options,
        )
        projected, refined = (both, None) if estimate is None else both
        heads = projected.unflatten(-1, (2, self.adapter.num_key_value_heads, -1))
        key, value = heads.permute(2, 0, 3, 1, 4)
        return DenseTokens(rotate(key, rope), value, self.rough[block]), refined

    def project(self, block: int, estimate: Tensor, rope: Rope) -> DenseTokens:
        """The block's own keys and values of estimated inputs [B, N, D]."""
        key, value = self.adapter.project(block, estimate.to(self.adapter.dtype))
        return DenseTokens(rotate(key, rope), value, self.rough[block])


class SimulatedInputs(SimulatedCodec):
    """Of codecs whose receivers know block inputs, and project them themselves."""

    @abstractmethod
    def remote_inputs(self, block: int, x: Tensor, received: Tensor | None) -> list[Tensor]:
        """Block inputs fp32 [B, S, D] as other ranks know them: of all, or of each receiver."""

    def remote_pairs(self, block: int, sent: SentTokens, received: Tensor | None) -> list[Pair]:
        inputs = self.remote_inputs(block, sent.hidden.float(), received)
        pairs = [self.adapter.project(block, x.to(sent.hidden.dtype)) for x in inputs]
        return [(rotate(key, sent.rope), value) for key, value in pairs]


class _Simulated(SimulatedInputs):
    def remote_inputs(self, block: int, x: Tensor, received: Tensor | None) -> list[Tensor]:
        _, output = self.quantize(block, x.unflatten(-1, (self.codebook.groups, -1)))
        return [output.flatten(2)]
