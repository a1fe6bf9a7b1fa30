"""ASTRA in one file: a Transformer block on one of N ranks.

Each rank holds the whole model and a slice of the tokens. In every block it sends its own tokens as
codes of a few bits, attends to them in full precision while the bits are in flight, attends to the
other ranks' tokens straight from the codes it received, and merges the two (Mixed-Precision
Attention, arXiv 2505.19342): one softmax over local and remote tokens,

    softmax(q·[K_local, K̂_remote]ᵀ/√d)·[V_local, V̂_remote].

The model itself is unmodified: it calls `before_block`, `attend` and `finish` through the hooks of
`models/`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from astra_kernels import _direct as direct

from .call import Call
from .codes.base import visible_tokens
from .exchange import compare_pictures, gather, receive_payloads
from .outgoing import Outgoing
from .trace import stage

NOTHING = (None, None)  # nothing is known of remote tokens


class Layer:
    """The Transformer blocks of one rank during `call`; the model's hooks call it."""

    def __init__(self, call: Call) -> None:
        self.call, self._outgoing = call, Outgoing(call)

    def embedded(self, hidden: Tensor) -> Tensor:
        """The class token's copy and this rank's shard of all embeddings."""
        return self.call.plan.local_tokens(hidden, self.call.rank)

    def before_block(self, block: int, hidden: Tensor) -> None:
        """Hidden-state codes leave before the block computes anything."""
        call = self.call
        if call.between is not None and not call.state.decoding:
            call.between(block)
        call.check_running()
        if call.codec.early and not call.state.decoding:
            if call.verifier is not None:
                call.verifier.begin(block, hidden)
            self._outgoing.code(block, (hidden[:, call.sizes.sent_slice],))

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Mixed-precision attention: [B, H, M, d] over local [B, Hkv, L, d] and remote tokens."""
        call, decoding = self.call, self.call.state.decoding
        if call.keeps_local:
            call.state.local[block] = key, value
        if call.verifier is not None:
            call.verifier.check(block, key, value)
        if not (call.codec.early or decoding):
            sent = call.sizes.sent_slice
            self._outgoing.code(block, (key[:, :, sent], value[:, :, sent]))
        local, local_lse = self._attend_locally(block, query, key, value, scale)
        self._outgoing.send()
        if decoding:
            remote, mask = call.state.remote.get(block, NOTHING)
        else:
            remote, mask = self.receive_codes(block)
        if remote is None:
            return local
        if mask is not None:
            mask = mask.to(query.device)
        # a decoder's replicated tokens, the first of the sequence, see no others
        first = call.plan.copies if call.plan.causal and not decoding else 0
        with stage("attend", block):
            out, lse = call.codec.attend(
                block, query[:, :, first:], remote, call.views.remote_rope, mask, scale
            )
        with stage("merge", block):
            return direct.merge_into(local, local_lse, out, lse, first)

    def _attend_locally(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        call, mask = self.call, self.call.views.local_mask
        causal = call.plan.causal and not call.state.decoding
        if mask is not None:
            mask = mask[:, : key.shape[2]]
        with stage("attend", block):
            return direct.attention(query, key, value, is_causal=causal, key_mask=mask, scale=scale)

    def receive_codes(self, block: int) -> tuple[Any, Tensor | None]:
        """This block's codes of every rank whose shard is visible here, and which of their tokens
        attention may see: bool [B, N], None for all. Without any codes: `NOTHING`."""
        call = self.call
        payloads = receive_payloads(call, block)
        if not payloads:
            return NOTHING
        with stage("unpack", block):
            remote = call.codec.decode(block, payloads, call.batch, call.views.remote_rope)
        mask = call.views.remote_mask
        if not call.codec.predicts:  # else attention takes what did not come as it was predicted
            mask = visible_tokens(payloads, call.batch, mask)
            # known on the host: a look at the mask would wait for the device
            if all(p.received is not None and not bool(p.received.any()) for p in payloads):
                remote, mask = NOTHING  # nobody's codes arrived
        if call.keeps:
            call.state.remote[block] = remote, mask
        return remote, mask

    def finish(self, hidden: Tensor) -> Tensor:
        """What the head needs of the final hidden states, from whichever ranks hold it."""
        call = self.call
        if call.state.decoding:
            return hidden
        compare_pictures(call)
        if call.on_device:  # before anybody has an answer
            call.mesh.check_received()
        read = gather(call, call.plan.without_halo(hidden, call.rank))
        return read.expand(-1, hidden.shape[1], -1) if call.pooled else read
