"""Differential codes of block inputs: what each adds to the estimate that the others have of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

import astra_kernels as ak

from ..models import Adapter
from ..plan import Plan
from .base import Bytes, Codec, CodeCosts, Payload, Pending, projection_flops
from .dense import DenseTokens
from .fields import CodebookFields
from .hidden import HiddenCodes, SimulatedInputs
from .packed import search_flops
from .rotary import Rope
from .simulated import Quantize, SimulatedCodec
from .verify import check_embedding


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

    key = "differential"
    accumulates = True
    needs_token_ids = True

    own: Tensor
    remote: Tensor

    @classmethod
    def create(cls, codebook: CodebookFields, adapter: Adapter) -> Codec:
        return cls(codebook, adapter)

    @classmethod
    def token_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int], block: int) -> float:
        return super().token_bits(codebook, sizes, block) if block else 0

    @classmethod
    def mean_bits(cls, codebook: CodebookFields, sizes: Mapping[str, int]) -> float:
        blocks = sizes["num_blocks"]
        return codebook.groups * codebook.code_bits * (blocks - 1) / blocks

    @classmethod
    def costs(cls, codebook: CodebookFields, adapter: Adapter) -> CodeCosts:
        """Block 0 codes nothing, but its remote keys and values are projected too."""
        blocks = len(adapter.blocks)
        code = search_flops(codebook, adapter.hidden_size) * (blocks - 1) / blocks
        return CodeCosts(code, projection_flops(adapter))

    @classmethod
    def simulate(
        cls, codebook: CodebookFields, adapter: Adapter, quantize: Quantize, receivers: int
    ) -> SimulatedCodec:
        return SimulatedDifferential(codebook, adapter, quantize, receivers)

    def begin(self, inputs: Mapping[str, Tensor], plan: Plan, rank: int) -> DifferentialCodes:
        embedded = self.adapter.embed(inputs).float()
        this = copy.copy(self)  # the tables stay shared
        this.own, this.remote = (
            embedded[:, plan.sent_slice(rank)],
            plan.remote_tokens(embedded, rank),
        )
        return this

    def payload_bytes(self, block: int, batch: int, tokens: int) -> int:
        return super().payload_bytes(block, batch, tokens) if block else 0

    def check_input(self, block: int, hidden: Tensor) -> None:
        if block == 0:
            check_embedding(hidden, self.own)

    def encode(self, block: int, what: Any, rope: Rope, out: Bytes) -> Pending | None:
        missing = (what.float() - self.own).unflatten(-1, (self.groups, -1))
        codes, pending = self.write(block, missing, out)
        self.own = self.own + ak.decode(codes, self.tables[block]).flatten(2)
        return pending

    def decode(
        self, block: int, payloads: Sequence[Payload], batch: int, rope: Rope
    ) -> DenseTokens:
        projection = self.projections[block]
        whole = all(payload.received is None for payload in payloads)
        if block and whole and projection is not None:
            codes = self.receive(block, payloads, batch)
            tokens, refined = self.look_up(block, codes, projection, rope, self.remote)
            assert refined is not None
            self.remote = refined
            return tokens
        if block:
            self.remote = self.remote + self.read_codewords(block, payloads, batch)[1].flatten(2)
        return self.project(block, self.remote, rope)


class SimulatedDifferential(SimulatedInputs):
    """Attributes:
    estimate: [B, S, D], what all ranks know of the tokens sent, had nothing been lost.
    lacking: [N, B, S, D], what each receiver lacks of it, after losses.
    """

    estimate: Tensor | None = None
    lacking: Tensor | None = None

    def remote_inputs(self, block: int, x: Tensor, received: Tensor | None) -> list[Tensor]:
        if self.estimate is None:
            self.estimate = x  # token ids are known everywhere, and so are embeddings
            return [x]
        known = self.estimate.detach()  # x − known is coded: the gradient is that of x alone
        missing = (x - known).unflatten(-1, (self.codebook.groups, -1))
        codewords, output = self.quantize(block, missing)
        # free of noise: the quantizer's loop is exact
        self.estimate = known + codewords.flatten(2)
        if received is not None:
            lost = ~received[:, None, :, None] * codewords.flatten(2).detach()
            self.lacking = lost if self.lacking is None else self.lacking + lost
        remote = known + output.flatten(2)
        return [remote] if self.lacking is None else [remote - lost for lost in self.lacking]
