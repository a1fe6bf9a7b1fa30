"""What crosses the network in place of a shard's tokens, and how attention reads it.

A space turns this rank's keys and values (or block inputs) into payload bytes, turns the payloads
of other ranks into what this rank keeps of their tokens, and attends to that. `layer.py` calls it
once a block; everything here is on the hot path and allocates only what it returns.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import astra_kernels as ak

from . import wire
from .codebook import Codebook, joint, split_tables
from .models import Adapter
from .plan import Plan
from .subspace import Search
from .trace import stage
from .transform import Known, flat, heads, unit

Rope = tuple[Tensor, Tensor] | None  # cos and sin, [B, N, d]


@dataclass(frozen=True)
class Payload:
    """The bytes of one rank's shard.

    Attributes:
        tokens: how many they stand for.
        heard: how many of them, from the first on, are of use here.
        came: which tokens' bytes are there, bool [B, tokens]; the others' are zeros. None: all.
    """

    view: memoryview
    tokens: int
    heard: int
    came: Tensor | None = None


@dataclass(frozen=True)
class Strip:
    """Where a payload has something of each token of sequence `row`: `bits` of the first token from
    byte `start` on, then as many of the next."""

    start: int
    bits: int
    row: int


def arrived(
    strips: Sequence[Strip], batch: int, tokens: int, gaps: Sequence[tuple[int, int]]
) -> Tensor:
    """Which tokens of a payload are whole, bool [batch, tokens]: all of whose bits lie outside of
    the missing byte ranges [start, stop)."""
    whole = torch.ones(batch, tokens, dtype=torch.bool)
    holes = [(start, stop) for start, stop in gaps if start < stop]
    for strip in strips:
        for start, stop in holes:
            first = 8 * (start - strip.start) // strip.bits
            last = -(8 * (strip.start - stop) // strip.bits)  # the first one behind it
            whole[strip.row, max(first, 0) : max(last, 0)] = False
    return whole


def seen(payloads: Sequence[Payload], batch: int, visible: Tensor | None) -> Tensor | None:
    """Which tokens heard of attention may see, bool [batch, N]: those that came and that are
    `visible`, no padding. None: all."""
    if all(payload.came is None for payload in payloads):
        return visible
    parts = [
        torch.ones(batch, p.heard, dtype=torch.bool) if p.came is None else p.came[:, : p.heard]
        for p in payloads
    ]
    came = torch.cat(parts, 1)
    return came if visible is None else came.to(visible.device) & visible


class Space(ABC):
    """One choice of what to send.

    Attributes:
        early: what is sent is known from the block's input, before its projections.
    """

    early: ClassVar[bool] = False

    def begin(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> Space:
        """The space of one forward pass of `rank`: another one where blocks build on each other."""
        return self

    @abstractmethod
    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        """Bytes of a shard of `tokens` tokens; nothing is sent or awaited where there are none."""

    @abstractmethod
    def strips(self, block: int, batch: int, tokens: int) -> list[Strip]:
        """Where each token's bits lie in the payload of `tokens` tokens."""

    @abstractmethod
    def encode(self, block: int, what: Any, rope: Rope, out: memoryview) -> None:
        """Writes the payload of this rank's shard into `out`.

        `what` is the block input [B, T, D] where `early`, else the keys and values of the shard,
        [B, Hkv, T, d] each, the keys rotated by `rope`.
        """

    @abstractmethod
    def decode(self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope) -> Any:
        """What this rank keeps of the remote tokens, in the order of `payloads`; None: nothing."""

    @abstractmethod
    def attend(
        self, block: int, query: Tensor, kept: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of `query` [B, H, M, d] over the kept tokens: (out, lse).

        `rope` and `mask` (bool [B, N]) belong to the remote tokens.
        """


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


def rotate(keys: Tensor, rope: Rope) -> Tensor:
    """Rotary positions, rotate-half convention: keys [B, H, N, d] by cos and sin [B, N, d]."""
    if rope is None:
        return keys
    cos, sin = (t.to(keys.dtype).unsqueeze(1) for t in rope)
    first, second = keys.chunk(2, -1)
    return keys * cos + torch.cat([-second, first], -1) * sin


def unrotate(keys: Tensor, rope: Rope) -> Tensor:
    """The inverse of `rotate`: the rotation by the negative angle, over its squared length."""
    if rope is None:
        return keys
    cos, sin = rope
    norm = cos * cos + sin * sin
    return rotate(keys, (cos / norm, -sin / norm))


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
            parts.append(codes[:, : payload.heard])
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


@dataclass(frozen=True)
class DenseTokens:
    """Remote keys (rotated) and values, [B, Hkv, N, d]."""

    key: Tensor
    value: Tensor


class _DenseAttention(Space):
    def attend(
        self, block: int, query: Tensor, kept: Any, rope: Rope, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        return ak.attention(query, kept.key, kept.value, key_mask=mask, scale=scale)


class HiddenCodes(_HiddenEncoder, _DenseAttention):
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
        this.own, this.remote = known[:, plan.sent(rank)], plan.far(known, rank)
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


class TransformCodes(_Codes, _DenseAttention):
    """Predictive transform codes of keys and values, see `transform.py`.

    Where a block's codes did not come, a receiver goes on from the prediction alone, which keeps
    far more than leaving the shard out of all later blocks (`bench.degraded`).

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

        sent = plan.sent(rank)
        this.own = Known(self.transforms, first[:, sent], embedding[:, sent])
        this.remote = Known(self.transforms, plan.far(first, rank), plan.far(embedding, rank))
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
        tokens, words = sum(payload.heard for payload in payloads), None
        if transform.codes:
            words = self.words(block, payloads, batch)
        shape = transform.offset.expand(batch, tokens, -1)
        return self._seen(known.learn(block, known.predict(block, shape), words), rope)

    def _seen(self, estimate: Tensor, rope: Rope) -> DenseTokens:
        key, value = heads(estimate, self.adapter.num_key_value_heads)
        dtype = self.adapter.dtype
        return DenseTokens(rotate(key, rope).to(dtype), value.to(dtype))


def int8(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., d] in 8 bits: int8 codes, and an fp16 step a vector, [..., 1]."""
    step = (vectors.abs().amax(-1, keepdim=True) / 127).to(torch.float16)
    codes = (vectors / step.clamp(min=2**-24)).round().clamp(-127, 127)
    return codes.to(torch.int8), step


class Dense(_DenseAttention):
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
        shape, heard = (2, batch, self.heads, payload.tokens), slice(payload.heard)
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
