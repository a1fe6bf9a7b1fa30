"""What codecs of packed codes have in common: the nearest codewords of vectors, as bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak

from .. import wire
from ..models import Adapter
from ..trace import stage
from .base import Codec, Payload, TokenBits, visible_tokens
from .fields import CodebookFields
from .rotary import Rope
from .search import Search, search_macs


class PackedCodes(Codec):
    """`groups` codes a token and block, packed; rows of a batch are byte-aligned."""

    tables: Sequence[Tensor]  # [C, K, w] a block
    searches: Sequence[Search]

    def __init__(self, codebook: CodebookFields, adapter: Adapter) -> None:
        self.groups, self.bits = codebook.groups, codebook.code_bits
        self.codewords, self.device = codebook.codewords, adapter.device
        tables = codebook.block_tables
        self.tables = [table.to(adapter.device, torch.float32) for table in tables]
        self.searches = [Search(table) for table in self.tables]

    @classmethod
    def token_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int], block: int) -> float:
        return codebook.groups * codebook.code_bits

    @classmethod
    def training_vectors(
        cls, recorded: Sequence[Any], groups: int, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The vectors fp32 [n, C, w] that are coded of one block, and the scales [Hkv, 2] that
        they were multiplied with, if any.

        `recorded` has a block's input [1, T, D], or its keys (not rotated) and values
        [1, Hkv, T, d], of each calibration window.
        """
        inputs = torch.cat([hidden.flatten(0, 1) for hidden in recorded])
        return inputs.unflatten(-1, (groups, -1)), None

    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        return batch * ak.packed_size(tokens * len(self.tables[block]), self.bits)

    def token_layout(self, block: int, batch: int, tokens: int) -> list[TokenBits]:
        groups = len(self.tables[block])
        row = ak.packed_size(tokens * groups, self.bits)
        return [TokenBits(b * row, groups * self.bits, b) for b in range(batch)]

    def write(self, block: int, vectors: Tensor, out: memoryview) -> Tensor:
        """Writes the nearest codewords of vectors [B, T, C, w] into `out`, packed; the codes."""
        codes = self.searches[block](vectors)
        row = len(out) // len(codes)
        with stage("pack", block):
            for b, codes_of_row in enumerate(codes.cpu()):
                ak.pack(codes_of_row, self.bits, out=out[b * row : (b + 1) * row])
        return codes

    def read_codewords(self, block: int, payloads: Sequence[Payload], batch: int) -> Tensor:
        """The codewords of payloads, [B, N, C, w]; zeros where a token's codes did not come."""
        codewords = ak.decode(self.read(block, payloads, batch), self.tables[block])
        received = visible_tokens(payloads, batch, None)
        if received is None:
            return codewords
        return codewords * received[:, :, None, None].to(codewords.device)

    def read(self, block: int, payloads: Sequence[Payload], batch: int) -> Tensor:
        """Unpacks and joins payloads: codes [B, N, C]. WireError: not as any rank packs them."""
        parts, groups = [], len(self.tables[block])
        for payload in payloads:
            view, row = payload.view, len(payload.view) // batch
            codes = torch.empty(batch, payload.tokens, groups, dtype=torch.int32)
            for b, out in enumerate(codes):
                count = out.numel()
                part = view[b * row : (b + 1) * row]
                wire.read_codes(part, self.bits, self.codewords, (out.data_ptr(), count), count)
            parts.append(codes[:, : payload.num_received])
        return torch.cat(parts, 1).to(self.device)


class TableLookup(PackedCodes):
    """Remote keys and values are table rows, [Hkv, S, K, d/S] a block: no projection."""

    keys: list[Tensor]
    values: list[Tensor]

    def decode(self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope) -> Tensor:
        return self.read(block, payloads, batch)

    def attend(
        self, block: int, query: Tensor, remote: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        return ak.coded_attention(
            query,
            remote,
            self.keys[block],
            self.values[block],
            scale=scale,
            rope=rope,
            code_mask=mask,
        )


def search_flops(codebook: CodebookFields, width: int) -> float:
    """FLOPs of finding the codewords of a token: G searches of K codewords of width/G channels."""
    groups = codebook.groups
    return 2.0 * groups * search_macs(codebook.codewords, width // groups)
