"""Joint codes of keys and values, before rotation: what is received is a table row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak
from astra_kernels import _elementwise as elementwise

from ..models import Adapter
from .base import Bytes, CodeCosts, Pending, geometry, key_value_width
from .fields import CodebookFields
from .layouts import merge_groups, split_groups, split_tables
from .packed import TableLookup, search_flops
from .rotary import Rope, rotate, unrotate
from .simulated import Pair, Quantize, SentTokens, SimulatedCodec
from .staging import ReceivedCodes


class KeyValueCodes(TableLookup):
    """Groups of channels of a key and its value have a code together: of each KV head on its own,
    or, `shared`, of all heads."""

    key = "kv"
    can_share_heads = True
    keeps_sessions = True
    half_dtype = torch.float16  # vectors are scaled: 10 bits of fraction say more than range

    def __init__(self, codebook: CodebookFields, adapter: Adapter) -> None:
        super().__init__(codebook, adapter)
        assert codebook.scales is not None
        self.shared = codebook.shared
        self.scales = codebook.scales.to(adapter.device)
        heads = adapter.num_key_value_heads
        pairs = zip(self.tables, self.scales, strict=True)
        split = [split_tables(table, scales, heads, self.shared) for table, scales in pairs]
        self.keys = [key.to(adapter.dtype) for key, _ in split]
        self.values = [value.to(adapter.dtype) for _, value in split]

    @classmethod
    def costs(cls, codebook: CodebookFields, adapter: Adapter) -> CodeCosts:
        return CodeCosts(search_flops(codebook, key_value_width(geometry(adapter))))

    @classmethod
    def simulate(
        cls, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> SimulatedCodec:
        return _Simulated(codebook, adapter, quantize, receivers)

    @classmethod
    def shares_heads(cls, groups: int, sizes: Mapping[str, int]) -> bool:
        return groups % sizes["num_key_value_heads"] != 0

    @classmethod
    def possible_groups(cls, shared: bool, sizes: Mapping[str, int]) -> list[int]:
        parts = [s for s in range(1, 257) if sizes["head_dim"] % s == 0]
        return parts if shared else [sizes["num_key_value_heads"] * s for s in parts]

    @classmethod
    def training_vectors(
        cls, recorded: Sequence[Any], groups: int, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        key = torch.cat([k for k, _ in recorded], 2)
        value = torch.cat([v for _, v in recorded], 2)
        scales = balance(key, value)
        return split_groups(key, value, scales, groups, shared).flatten(0, 1), scales

    def encode(self, block: int, what: Any, rope: Rope, out: Bytes) -> Pending | None:
        (key, value), scales = what, self.scales[block]
        made = None
        if self.staging is not None:
            parts = self.groups if self.shared else self.groups // key.shape[1]
            made = elementwise.key_value_vectors(
                key, value, rope, scales, parts, self.shared, self.vector_dtype
            )
        if made is not None:
            vectors, self.finite = made
        else:
            key = unrotate(key.float(), rope)
            vectors = split_groups(key, value.float(), scales, self.groups, self.shared)
        return self.write_only(block, vectors, out)

    def tensors(self, block: int, remote: Any, rope: Rope) -> tuple[Tensor, Tensor]:
        codes = remote.unpacked() if isinstance(remote, ReceivedCodes) else remote
        codewords = ak.decode(codes, self.tables[block])
        heads = self.keys[block].shape[0]
        key, value = merge_groups(codewords, self.scales[block], heads, self.shared)
        dtype = self.values[block].dtype
        return rotate(key, rope).to(dtype), value.to(dtype)


class _Simulated(SimulatedCodec):
    def remote_pairs(self, block: int, sent: SentTokens, received: Tensor | None) -> list[Pair]:
        book, key = self.codebook, unrotate(sent.key.float(), sent.rope)
        assert book.scales is not None
        scales = book.scales[block].to(key.device)
        vectors = split_groups(key, sent.value.float(), scales, book.groups, book.shared)
        _, output = self.quantize(block, vectors)
        remote_key, remote_value = merge_groups(output, scales, key.shape[1], book.shared)
        return [(rotate(remote_key, sent.rope), remote_value)]


def balance(key: Tensor, value: Tensor) -> Tensor:
    """Scales [Hkv, 2] that give a head's keys and values the same total variance."""

    def deviation(tensor: Tensor) -> Tensor:
        flat = tensor.transpose(0, 1).flatten(1, 2)  # [Hkv, n, d]
        return (flat - flat.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt()

    return 1 / torch.stack([deviation(key), deviation(value)], -1).clamp(min=1e-6)
