"""What crosses the network in place of a shard's tokens, and how attention reads it.

A space turns this rank's keys and values (or block inputs) into payload bytes, turns the payloads
of other ranks into what this rank keeps of their tokens, and attends to that. `layer.py` calls it
once a block; everything here is on the hot path and allocates only what it returns.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak

from .. import wire
from ..models import Adapter
from ..plan import Plan
from ..trace import stage
from .base import Payload, Space, Strip, seen
from .codebook import Codebook
from .dense import Dense, DenseAttention, DenseTokens, Nothing
from .layouts import flat, heads, joint, split_tables
from .rotary import Rope, rotate, unrotate
from .search import Search
from .transform import Known, unit


def make_space(codebook: Codebook, adapter: Adapter) -> Space:
    """The space that `codebook` asks for, with its tables on the model's device and dtype."""
    codebook.check_model(adapter)
    if codebook.space == "kv":
        return KeyValueCodes(codebook, adapter)
    if codebook.space == "hidden":
        single = codebook.groups == 1
        return (ProjectedHiddenCodes if single else HiddenCodes)(codebook, adapter)
    if codebook.space == "differential":
        return DifferentialCodes(codebook, adapter)
    if codebook.space == "transform":
        return TransformCodes(codebook, adapter)
    return Dense(codebook.dtype, adapter) if codebook.space == "none" else Nothing()


class _Codes(Space):
    """Packing and unpacking, alike in all coded spaces: rows of a batch are byte-aligned."""

    tables: Sequence[Tensor]  # [C, K, w] a block
    searches: Sequence[Search]

    def __init__(self, codebook: Codebook, adapter: Adapter) -> None:
        self.groups, self.bits = codebook.groups, codebook.code_bits
        self.codewords, self.device = codebook.codewords, adapter.device
        if codebook.tables is not None:
            self.tables = list(codebook.tables.to(adapter.device, torch.float32))
            self.searches = [Search(table) for table in self.tables]

    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        return batch * ak.packed_size(tokens * len(self.tables[block]), self.bits)

    def strips(self, block: int, batch: int, tokens: int) -> list[Strip]:
        groups = len(self.tables[block])
        row = ak.packed_size(tokens * groups, self.bits)
        return [Strip(b * row, groups * self.bits, b) for b in range(batch)]

    def write(self, block: int, vectors: Tensor, out: memoryview) -> Tensor:
        """Writes the nearest codewords of vectors [B, T, C, w] into `out`, packed; the codes."""
        codes = self.searches[block](vectors)
        row = len(out) // len(codes)
        with stage("pack", block):
            for b, codes_of_row in enumerate(codes.cpu()):
                ak.pack(codes_of_row, self.bits, out=out[b * row : (b + 1) * row])
        return codes

    def words(self, block: int, payloads: Sequence[Payload], batch: int) -> Tensor:
        """The codewords of payloads, [B, N, C, w]; zeros where a token's codes did not come."""
        found = ak.decode(self.read(block, payloads, batch), self.tables[block])
        came = seen(payloads, batch, None)
        return found if came is None else found * came[:, :, None, None].to(found.device)

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
        codes = torch.cat(parts, 1)
        return codes.to(self.device)


class _LookedUp(_Codes):
    """Remote keys and values are table rows, [Hkv, S, K, d/S] a block: no projection."""

    keys: list[Tensor]
    values: list[Tensor]

    def decode(self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope) -> Tensor:
        return self.read(block, payloads, batch)

    def attend(
        self, block: int, query: Tensor, kept: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        return ak.coded_attention(
            query,
            kept,
            self.keys[block],
            self.values[block],
            scale=scale,
            rope=rope,
            code_mask=mask,
        )


class KeyValueCodes(_LookedUp):
    """Joint codes of keys and values."""

    def __init__(self, codebook: Codebook, adapter: Adapter) -> None:
        super().__init__(codebook, adapter)
        assert codebook.scales is not None
        self.shared = codebook.shared
        self.scales = codebook.scales.to(adapter.device)
        heads = adapter.num_key_value_heads
        pairs = zip(self.tables, self.scales, strict=True)
        split = [split_tables(table, scales, heads, self.shared) for table, scales in pairs]
        self.keys = [key.to(adapter.dtype) for key, _ in split]
        self.values = [value.to(adapter.dtype) for _, value in split]

    def encode(self, block: int, what: Any, rope: Rope, out: memoryview) -> None:
        key, value = what
        key, scales = unrotate(key.float(), rope), self.scales[block]
        vectors = joint(key, value.float(), scales, self.groups, self.shared)
        self.write(block, vectors, out)


class _HiddenEncoder(_Codes):
    """The sender's side of hidden-state codes: channel groups of block inputs."""

    early = True

    def encode(self, block: int, what: Any, rope: Rope, out: memoryview) -> None:
        self.write(block, what.float().unflatten(-1, (self.groups, -1)), out)


class ProjectedHiddenCodes(_HiddenEncoder, _LookedUp):
    """Block inputs in one code a token: norm, W_K and W_V are applied to the codebook, once."""

    def __init__(self, codebook: Codebook, adapter: Adapter) -> None:
        super().__init__(codebook, adapter)
        self.keys, self.values = [], []
        with torch.inference_mode():
            for block, table in enumerate(self.tables):
                key, value = adapter.project(block, table.to(adapter.dtype))  # [1, Hkv, K, d]
                self.keys.append(key.transpose(0, 1).contiguous())  # [Hkv, S=1, K, d]
                self.values.append(value.transpose(0, 1).contiguous())


class HiddenCodes(_HiddenEncoder, DenseAttention):
    """Block inputs in G codes a token (the paper): the receiver projects the estimate itself."""

    def __init__(self, codebook: Codebook, adapter: Adapter) -> None:
        super().__init__(codebook, adapter)
        self.adapter = adapter

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> DenseTokens:
        estimate = ak.decode(self.read(block, payloads, batch), self.tables[block]).flatten(2)
        return self.seen(block, estimate, rope)

    def seen(self, block: int, estimate: Tensor, rope: Rope) -> DenseTokens:
        """The block's own keys and values of estimated inputs [B, N, D]."""
        key, value = self.adapter.project(block, estimate.to(self.adapter.dtype))
        return DenseTokens(rotate(key, rope), value)


class DifferentialCodes(HiddenCodes):
    """Codes of what a block's input adds to the estimate that the other ranks have of it.

    The estimate starts as the token's embedding, which every rank computes from the token ids, so
    block 0 sends nothing; each later block adds its codewords. The sender adds them too, to the
    estimates of its own tokens: what one block's codes miss, the next block's codes make good.
    Where a block's codes did not come, a receiver goes on without them: its estimate stays off.

    Attributes:
        own: fp32 [B, T, D], what the others know of this rank's tokens; of one pass, see `begin`.
        remote: fp32 [B, N, D], what this rank knows of the tokens that it sees.
    """

    own: Tensor
    remote: Tensor

    def begin(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> DifferentialCodes:
        known = self.adapter.embed(inputs).float()
        this = copy.copy(self)  # the tables stay shared
        this.own, this.remote = known[:, plan.sent_slice(rank)], plan.remote_tokens(known, rank)
        return this

    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        return super().payload_bytes(block, batch, tokens) if block else 0

    def encode(self, block: int, what: Any, rope: Rope, out: memoryview) -> None:
        missing = (what.float() - self.own).unflatten(-1, (self.groups, -1))
        codes = self.write(block, missing, out)
        self.own = self.own + ak.decode(codes, self.tables[block]).flatten(2)

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> DenseTokens:
        if block:
            self.remote = self.remote + self.words(block, payloads, batch).flatten(2)
        return self.seen(block, self.remote, rope)


class TransformCodes(_Codes, DenseAttention):
    """Predictive transform codes of keys and values, see `transform.py`.

    Where a block's codes did not come, a receiver goes on from the prediction alone, which keeps
    far more than leaving the shard out of all later blocks (`bench.lossy.degraded`).

    Attributes:
        own: what the others know of this rank's tokens; of one pass, see `begin`.
        remote: what this rank knows of the tokens that it sees.
    """

    own: Known
    remote: Known

    def __init__(self, codebook: Codebook, adapter: Adapter) -> None:
        super().__init__(codebook, adapter)
        self.adapter = adapter
        self.transforms = [t.to(adapter.device) for t in codebook.transforms]
        self.tables = [t.tables for t in self.transforms]
        self.searches = [Search(table) for table in self.tables]

    def begin(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> TransformCodes:
        this = copy.copy(self)  # the tensors stay shared
        if not self.adapter.token_ids:
            this.own, this.remote = (Known(self.transforms, None, None) for _ in range(2))
            return this
        embedded = self.adapter.embed(inputs)
        first, embedding = flat(*self.adapter.project(0, embedded)).float(), unit(embedded)

        sent = plan.sent_slice(rank)
        this.own = Known(self.transforms, first[:, sent], embedding[:, sent])
        this.remote = Known(
            self.transforms, plan.remote_tokens(first, rank), plan.remote_tokens(embedding, rank)
        )
        return this

    def encode(self, block: int, what: Any, rope: Rope, out: memoryview) -> None:
        key, value = what
        y = flat(unrotate(key.float(), rope), value.float())
        transform, predicted = self.transforms[block], self.own.predict(block, y)
        codes = self.write(block, transform.coordinates(y - predicted), out)
        self.own.learn(block, predicted, ak.decode(codes, transform.tables))

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> DenseTokens:
        known, transform = self.remote, self.transforms[block]
        if block == 0 and known.reached == 0:  # every rank computed it
            assert known.estimate is not None
            return self._seen(known.estimate, rope)
        tokens, words = sum(payload.num_received for payload in payloads), None
        if transform.codes:
            words = self.words(block, payloads, batch)
        shape = transform.offset.expand(batch, tokens, -1)
        return self._seen(known.learn(block, known.predict(block, shape), words), rope)

    def _seen(self, estimate: Tensor, rope: Rope) -> DenseTokens:
        key, value = heads(estimate, self.adapter.num_key_value_heads)
        dtype = self.adapter.dtype
        return DenseTokens(rotate(key, rope).to(dtype), value.to(dtype))
