"""Predictive transform codes of keys and values; their formulas are in `predictive.py`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak
from astra_kernels import _direct as direct

from ..models import Adapter
from ..plan import Plan
from .base import Bytes, CodeCosts, Payload, Pending, TokenBits, as_tensor, projection_flops
from .dense import DenseAttention, DenseTokens
from .fields import CodebookFields
from .latent import DecoderState, code_macs, latent_codes, sums_rows, table_rows
from .layouts import merge_heads, merge_rotated, split_heads
from .packed import PackedCodes, pack_rows, unpack_rows
from .predictive import embedding_features
from .rotary import Rope, inverse, rotate, unrotate
from .simulated import Pair, Quantize, SentTokens, SimulatedCodec
from .staging import packed_right


class TransformCodes(PackedCodes, DenseAttention):
    """Each block has a predictor, a transform and a number of codes of its own.

    Where a token's codes of a block did not come, a receiver attends to the prediction alone, and
    goes on from it: that keeps more than leaving the token out of that block, and far more than
    leaving it out of all later ones (`bench.lossy`).

    Attributes:
        own_inputs: embeddings and ê of this rank's tokens; of one pass, see `begin`.
        remote: what this rank knows of the tokens that it sees.
    """

    key = "transform"
    accumulates = True
    predicts = True
    allots_bits = True
    gains_by_variety = True
    keeps_sessions = True

    own_inputs: tuple[Tensor, Tensor]
    remote: DecoderState

    def __init__(self, codebook: CodebookFields, adapter: Adapter) -> None:
        super().__init__(codebook, adapter)
        self.adapter = adapter
        self.codes = latent_codes([t.to(adapter.device) for t in codebook.transforms])
        # of each block, where receivers add up rows
        self.rows: list[Tensor] | None = None
        if direct.adds_rows(adapter.device) and sums_rows(codebook.transforms, _weights(adapter)):
            self.rows = [table_rows(transform) for transform in codebook.transforms]
        self.basis = basis_on(codebook, adapter)
        self.fine = [fine.to(adapter.device) for fine in codebook.fine]
        self.fine_tokens = codebook.fine_tokens
        self.fine_bits, self.fine_codewords = codebook.fine_code_bits, codebook.fine_codewords
        # of one pass: which of the tokens sent have fine codes, and by what keys are turned back
        self.fine_sent, self.dtype = slice(0), adapter.dtype
        self.turned_back: tuple[Rope, Rope] = (None, None)
        self._own: DecoderState | None = None

    @classmethod
    def token_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int], block: int) -> float:
        return codebook.transforms[block].codes * codebook.code_bits

    @classmethod
    def mean_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int]) -> float:
        transforms = codebook.transforms
        return sum(t.codes for t in transforms) * codebook.code_bits / len(transforms)

    @classmethod
    def costs(cls, codebook: CodebookFields, adapter: Adapter) -> CodeCosts:
        """The recursion for every token; of own ones the axes and the search, else the way back,
        as a CPU does it: a GPU always multiplies where a CPU may add up rows."""
        transforms = codebook.transforms
        sums = sums_rows(transforms, _weights(adapter))
        pairs = zip(transforms, (None, *transforms[:-1]), strict=True)
        macs = [code_macs(transform, before, sums) for transform, before in pairs]
        # once for all blocks: the embedding's coordinates, and of remote tokens block 0, not coded
        once = 0.0 if codebook.basis is None else float(codebook.basis.numel())
        first = projection_flops(adapter) / 2 if adapter.token_ids else 0.0
        code, receive = (sum(parts) / len(macs) for parts in zip(*macs, strict=True))
        code, receive = code + once / len(macs), receive + (once + first) / len(macs)
        added = sum(t.codes * len(t.offset) for t in transforms) / len(macs) if sums else 0.0
        if not codebook.fine:
            return CodeCosts(2.0 * code, 2.0 * receive, sums=added)
        fine = [
            sum(parts) / len(macs) for parts in zip(*(f.macs for f in codebook.fine), strict=True)
        ]
        # the sender reconstructs these tokens, too
        restore = sum(t.up.numel() + (not sums) * t.synthesis.numel() for t in transforms)
        return CodeCosts(
            2.0 * code,
            2.0 * receive,
            fine_code=2.0 * (fine[0] + restore / len(macs)),
            fine_receive=2.0 * fine[1],
            sums=added,
            fine_sums=added,
        )

    @classmethod
    def rounds(cls, codebook: CodebookFields) -> bool:
        return True

    @classmethod
    def simulate(
        cls, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> SimulatedCodec:
        return _Simulated(codebook, adapter, quantize, receivers)

    @classmethod
    def default_prefix(cls, adapter: Adapter) -> int:
        return 1 if adapter.causal else 0

    def begin(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> TransformCodes:
        this = copy.copy(self)  # the tensors stay shared
        this.fine_sent = plan.fine_tokens(rank, self.fine_tokens)
        this.dtype, this.turned_back, this._own = self.adapter.dtype, (None, None), None
        if not self.adapter.token_ids:
            batch = len(next(iter(inputs.values())))
            received = sum(plan.num_received(rank, n) for n in plan.sources(rank))
            this._own = DecoderState(self.codes, None, None, batch, plan.num_sent(rank))
            this.remote = DecoderState(self.codes, None, None, batch, received)
            return this
        sent = plan.sent_slice(rank)
        # of a decoder's tokens those that it sends and those before its shard
        seen = max(sent.stop, plan.shard(rank).start) if plan.causal else None
        embedded = self.adapter.embed(inputs)[:, :seen]
        embedding = embedding_features(embedded, self.basis)
        this.own_inputs = embedded[:, sent], embedding[:, sent]
        this.remote = self._started(
            plan.remote_tokens(embedded, rank), plan.remote_tokens(embedding, rank)
        )
        return this

    def _started(self, embedded: Tensor, embedding: Tensor) -> DecoderState:
        """What is known of tokens before anything is sent, from their embeddings and ê."""
        first = merge_heads(*self.adapter.project(0, embedded)).float()
        return DecoderState(self.codes, first, embedding)

    @property
    def own(self) -> DecoderState:
        """What the others know of this rank's tokens."""
        if self._own is None:
            self._own = self._started(*self.own_inputs)
        return self._own

    def pass_over(self, block: int, what: Any, rope: Rope) -> None:
        """Takes block 0's keys and values of its own tokens from the block, which makes them.

        Not of 16 bits: what the others compute is rounded once, before it is rotated.
        """
        if block == 0 and self._own is None and self.adapter.dtype == torch.float32:
            self._own = DecoderState(self.codes, self._unrotated(what, rope), self.own_inputs[1])

    def _unrotated(self, what: Any, rope: Rope) -> Tensor:
        """y, [B, N, E], of keys and values as `encode` has them."""
        key, value = what
        if self.turned_back[0] is not rope:  # the same for every block
            self.turned_back = rope, inverse(rope, torch.float32)
        return merge_rotated(key, value, self.turned_back[1])

    def encode(self, block: int, what: Any, rope: Rope, out: Bytes) -> Pending | None:
        y = self._unrotated(what, rope)
        size = self.payload_bytes(block, len(y), y.shape[1])
        codes, pending = self.write(block, self.own.coordinates(block, y), out[:size])
        codewords = direct.decode(codes, self.tables[block])
        if len(out) > size:
            self._write_fine(block, y, codes, codewords, out[size:])
        self.own.update(block, codewords)
        return pending

    def _write_fine(
        self, block: int, y: Tensor, codes: Tensor, codewords: Tensor, out: Bytes
    ) -> None:
        """What the codes of the last tokens lack, for the next rank."""
        known = self._restored(self.own, block, codes, codewords, self.fine_sent)
        fine = self.fine[block].encode(y[:, self.fine_sent] - known)
        # else they would be read as those of other tokens
        assert len(out) == self.fine_bytes(block, len(fine), fine.shape[1])
        pack_rows(fine, self.fine_bits, out)

    def _restored(
        self,
        state: DecoderState,
        block: int,
        codes: Tensor,
        codewords: Tensor,
        tokens: slice = slice(None),
    ) -> Tensor:
        """ŷ of `block`, [B, N, E], from codes [B, N, C], below 0 where they did not come, and
        their codewords [B, N, C, w]; `tokens`: of those alone."""
        known = block == 0 and state.first is not None  # exactly, and not to be written to
        if self.rows is None or known:
            return state.estimate(block, codewords, tokens)
        estimate = state.estimate(block, None, tokens)
        chosen = codes[:, tokens].flatten(0, 1).contiguous()
        direct.add_rows(estimate.flatten(0, 1), chosen, self.rows[block])
        return estimate

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> DenseTokens:
        state, stop = self.remote, 0
        if self.codes[block].transform.codes:
            codes, codewords = self.read_codewords(block, payloads, batch)
            estimate = self._restored(state, block, codes, codewords)
            state.update(block, codewords)
        else:
            estimate = state.estimate(block, None)
            state.update(block, None)
        for payload in payloads:
            stop += payload.num_received
            if payload.num_fine:
                estimate[:, stop - payload.num_fine : stop] += self._read_fine(
                    block, payload, batch
                )
        # of block 0 that every rank computes itself nothing is left out
        return self._tokens(estimate, rope, rough=block > 0 or state.first is None)

    def _read_fine(self, block: int, payload: Payload, batch: int) -> Tensor:
        """What fine codes add to ŷ of the tokens that they came for, [B, num_fine, E]."""
        shape = (batch, payload.num_fine, self.fine[block].codes)
        assert payload.fine is not None
        codes = unpack_rows(payload.fine, shape, self.fine_bits, self.fine_codewords)
        added = self.fine[block].decode(codes.to(self.device))
        for received in (payload.fine_received, payload.received):
            if received is not None:  # the codes that they refine have to be there, too
                last = received[:, : payload.num_received][:, -payload.num_fine :]
                added = added * last[..., None].to(added.device)
        return added

    def fine_bytes(self, block: int, batch: int, tokens: int) -> int:
        if not self.fine:
            return 0
        return batch * ak.packed_size(tokens * self.fine[block].codes, self.fine_bits)

    def fine_layout(self, block: int, batch: int, tokens: int) -> list[TokenBits]:
        if not (self.fine and tokens and self.fine[block].codes):
            return []
        width = self.fine[block].codes * self.fine_bits
        row = ak.packed_size(tokens * self.fine[block].codes, self.fine_bits)
        return [TokenBits(b * row, width, b) for b in range(batch)]

    def codes_are_right(self, block: int, payload: Payload, batch: int) -> Tensor | None:
        right = super().codes_are_right(block, payload, batch)
        if not payload.num_fine:
            return right
        assert payload.fine is not None
        rows = as_tensor(payload.fine).view(batch, -1)
        count = payload.num_fine * self.fine[block].codes
        fine = packed_right(rows, count, self.fine_bits, self.fine_codewords)
        return fine if right is None else right & fine

    def _tokens(self, estimate: Tensor, rope: Rope, rough: bool) -> DenseTokens:
        key, value = split_heads(estimate, self.adapter.num_key_value_heads)
        return DenseTokens(rotate(key, rope).to(self.dtype), value.to(self.dtype), rough)


def _weights(adapter: Adapter) -> float:
    """Of all blocks, as many as they multiply a token by."""
    return len(adapter.blocks) * adapter.block_flops()[0] / 2


def basis_on(codebook: CodebookFields, adapter: Adapter) -> Tensor | None:
    """The codebook's basis of embeddings, where the model is."""
    return None if codebook.basis is None else codebook.basis.to(adapter.device)


class _Simulated(SimulatedCodec):
    """Attributes:
    state: what all know of the tokens sent, had nothing been lost.
    states: and each receiver.
    """

    def __init__(
        self, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> None:
        super().__init__(codebook, adapter, quantize, receivers)
        self.codes = latent_codes([t.to(adapter.device) for t in codebook.transforms])
        self.basis = basis_on(codebook, adapter)
        self.state: DecoderState
        self.states: list[DecoderState] = []

    def remote_pairs(self, block: int, sent: SentTokens, received: Tensor | None) -> list[Pair]:
        y = merge_heads(unrotate(sent.key.float(), sent.rope), sent.value.float())
        if not block:
            first = embedding = None
            if self.adapter.token_ids:
                first = y.detach()
                embedding = embedding_features(sent.hidden.detach(), self.basis)
            self.state = DecoderState(self.codes, first, embedding, *y.shape[:2])
            self.states = [self.state.fork() for _ in range(self.receivers)]
            if first is not None:
                return [self._pair(y, sent)]
        estimates = self._estimates(block, y, received, sent.near)
        return [self._pair(known, sent) for known in estimates]

    def _pair(self, y: Tensor, sent: SentTokens) -> Pair:
        key, value = split_heads(y, sent.key.shape[1])
        return rotate(key, sent.rope), value

    def _estimates(
        self, block: int, y: Tensor, received: Tensor | None, near: Tensor | None
    ) -> list[Tensor]:
        """Keys and values y [B, S, E] as the others know them, with the gradient of y itself."""
        transform = self.codes[block].transform
        estimate, codewords, step = self.state.estimate(block, None), None, y.new_zeros(())
        if transform.codes:
            found, output = self.quantize(block, self.state.coordinates(block, y))
            codewords, step = found.detach(), transform.synthesize(output.detach())
        fine = None if near is None else self._fine(block, y, codewords)
        # free of noise: the quantizer's loop is exact
        self.state.update(block, codewords)
        if self.receivers == 1:
            return [y + (estimate + step - y).detach()]
        estimates = []
        for receiver, state in enumerate(self.states):
            arrived = codewords
            if codewords is not None and received is not None:
                arrived = codewords * received[receiver][:, None, None]
            known = state.estimate(block, arrived)
            state.update(block, arrived)
            if fine is not None and near is not None:
                here = near[receiver] if received is None else near[receiver] & received[receiver]
                known = known + fine * here[:, None]
            estimates.append(y + (known - y).detach())
        return estimates

    def _fine(self, block: int, y: Tensor, codewords: Tensor | None) -> Tensor | None:
        """What fine codes would add to ŷ of all tokens sent, [B, S, E]."""
        if not self.codebook.fine or codewords is None:
            return None
        fine = self.codebook.fine[block].to(self.adapter.device)
        return fine.decode(fine.encode(y.detach() - self.state.estimate(block, codewords)))
