"""Predictive transform codes of keys and values; their formulas are in `predictive.py`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

import astra_kernels as ak

from ..models import Adapter
from ..plan import Plan
from .base import CodeCosts, Payload, Pending
from .dense import DenseAttention, DenseTokens
from .fields import CodebookFields
from .layouts import merge_heads, split_heads
from .packed import PackedCodes
from .predictive import DecoderState, rms_normalized
from .rotary import Rope, rotate, unrotate
from .simulated import Pair, Quantize, SentTokens, SimulatedCodec


class TransformCodes(PackedCodes, DenseAttention):
    """Each block has a predictor, a transform and a number of codes of its own.

    Where a block's codes did not come, a receiver goes on from the prediction alone, which keeps
    far more than leaving the shard out of all later blocks (`bench.lossy.degraded`).

    Attributes:
        own: what the others know of this rank's tokens; of one pass, see `begin`.
        remote: what this rank knows of the tokens that it sees.
    """

    key = "transform"
    accumulates = True
    predicts = True
    allots_bits = True
    gains_by_variety = True

    own: DecoderState
    remote: DecoderState

    def __init__(self, codebook: CodebookFields, adapter: Adapter) -> None:
        super().__init__(codebook, adapter)
        self.adapter = adapter
        self.transforms = [t.to(adapter.device) for t in codebook.transforms]

    @classmethod
    def token_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int], block: int) -> float:
        return codebook.transforms[block].codes * codebook.code_bits

    @classmethod
    def mean_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int]) -> float:
        transforms = codebook.transforms
        return sum(t.codes for t in transforms) * codebook.code_bits / len(transforms)

    @classmethod
    def costs(cls, codebook: CodebookFields, adapter: Adapter) -> CodeCosts:
        """The predictor and the way back for every token; search and the way there for own ones."""
        macs = [t.macs for t in codebook.transforms]
        code, receive = (sum(parts) / len(macs) for parts in zip(*macs, strict=True))
        return CodeCosts(2.0 * code, 2.0 * receive)

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
        if not self.adapter.token_ids:
            this.own, this.remote = (DecoderState(self.transforms, None, None) for _ in range(2))
            return this
        embedded = self.adapter.embed(inputs)
        first = merge_heads(*self.adapter.project(0, embedded)).float()
        embedding = rms_normalized(embedded)

        sent = plan.sent_slice(rank)
        this.own = DecoderState(self.transforms, first[:, sent], embedding[:, sent])
        this.remote = DecoderState(
            self.transforms, plan.remote_tokens(first, rank), plan.remote_tokens(embedding, rank)
        )
        return this

    def encode(self, block: int, what: Any, rope: Rope, out: memoryview) -> Pending | None:
        key, value = what
        y = merge_heads(unrotate(key.float(), rope), value.float())
        transform, predicted = self.transforms[block], self.own.predict(block, y)
        codes, pending = self.write(block, transform.coordinates(y - predicted), out)
        self.own.update(block, predicted, ak.decode(codes, transform.tables))
        return pending

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> DenseTokens:
        state, transform = self.remote, self.transforms[block]
        if block == 0 and state.reached == 0:  # every rank computed it
            assert state.estimate is not None
            return self._tokens(state.estimate, rope)
        tokens, codewords = sum(payload.num_received for payload in payloads), None
        if transform.codes:
            codewords = self.read_codewords(block, payloads, batch)
        shape = transform.offset.expand(batch, tokens, -1)
        return self._tokens(state.update(block, state.predict(block, shape), codewords), rope)

    def _tokens(self, estimate: Tensor, rope: Rope) -> DenseTokens:
        key, value = split_heads(estimate, self.adapter.num_key_value_heads)
        dtype = self.adapter.dtype
        return DenseTokens(rotate(key, rope).to(dtype), value.to(dtype))


class _Simulated(SimulatedCodec):
    """Attributes:
    state: what all know of the tokens sent, had nothing been lost.
    states: and each receiver.
    """

    def __init__(
        self, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> None:
        super().__init__(codebook, adapter, quantize, receivers)
        self.transforms = [t.to(adapter.device) for t in codebook.transforms]
        self.state: DecoderState
        self.states: list[DecoderState] = []

    def remote_pairs(self, block: int, sent: SentTokens, received: Tensor | None) -> list[Pair]:
        y = merge_heads(unrotate(sent.key.float(), sent.rope), sent.value.float())
        if not block:
            first = embedding = None
            if self.adapter.token_ids:
                first, embedding = y.detach(), rms_normalized(sent.hidden.detach())
            self.state = DecoderState(self.transforms, first, embedding)
            self.states = [self.state.fork() for _ in range(self.receivers)]
            if first is not None:
                return [self._pair(y, sent)]
        return [self._pair(known, sent) for known in self._estimates(block, y, received)]

    def _pair(self, y: Tensor, sent: SentTokens) -> Pair:
        key, value = split_heads(y, sent.key.shape[1])
        return rotate(key, sent.rope), value

    def _estimates(self, block: int, y: Tensor, received: Tensor | None) -> list[Tensor]:
        """Keys and values y [B, S, E] as the others know them, with the gradient of y itself."""
        transform, predicted = self.transforms[block], self.state.predict(block, y)
        codewords, step = None, y.new_zeros(())
        if transform.codes:
            z = transform.coordinates(y - predicted)
            estimate, output = self.quantize(block, z)
            codewords, step = estimate.detach(), transform.synthesize(output.detach())
        # free of noise: the quantizer's loop is exact
        self.state.update(block, predicted, codewords)
        if self.receivers == 1:
            return [y + (predicted + step - y).detach()]
        estimates = []
        for receiver, state in enumerate(self.states):
            arrived = codewords
            if codewords is not None and received is not None:
                arrived = codewords * received[receiver][:, None, None]
            known = state.update(block, state.predict(block, y), arrived)
            estimates.append(y + (known - y).detach())
        return estimates
