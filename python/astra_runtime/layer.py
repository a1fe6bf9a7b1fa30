"""ASTRA in one file: a Transformer block on one of N ranks.

Each rank holds the whole model and a slice of the tokens. In every block it sends its own tokens as
codes of a few bits, attends to them in full precision while the bits are in flight, attends to the
other ranks' tokens straight from the codes it received, and merges the two (Mixed-Precision
Attention, arXiv 2505.19342): one softmax over local and remote tokens,

    softmax(q·[K_local, K̂_remote]ᵀ/√d)·[V_local, V̂_remote].

The model itself is unmodified: it calls `before_block`, `attend` and `finish` through the hooks of
`models/base.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak

from .call import Call
from .codes.base import Payload, seen
from .exchange import gather, receive_codes
from .trace import stage

NOTHING = (None, None)  # nothing is known of remote tokens


class Layer:
    """The Transformer blocks of one rank during `call`; the model's hooks call it."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def embedded(self, hidden: Tensor) -> Tensor:
        """The class token's copy and this rank's shard of all embeddings."""
        return self.call.plan.local_tokens(hidden, self.call.rank)

    def before_block(self, block: int, hidden: Tensor) -> None:
        """Hidden-state codes leave before the block computes anything."""
        call = self.call
        if call.space.early and not call.decoding:
            self.send_codes(block, hidden[:, call.sent_slice])

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Mixed-precision attention: [B, H, M, d] over local [B, Hkv, L, d] and remote tokens."""
        call = self.call
        if not call.space.early and not call.decoding:
            sent = call.sent_slice
            self.send_codes(block, (key[:, :, sent], value[:, :, sent]))
        mask, causal = call.local_mask, call.plan.causal and not call.decoding
        with stage("attend", block):
            out, lse = ak.attention(query, key, value, is_causal=causal, key_mask=mask, scale=scale)
        remote, mask = call.kept.get(block, NOTHING) if call.decoding else self.receive_codes(block)
        if remote is not None:
            rope, mask = call.remote_rope, None if mask is None else mask.to(query.device)
            first = call.plan.copies if causal else 0  # a decoder's first tokens see no others
            query, near, lse = query[:, :, first:], out[:, :, first:], lse[:, :, first:]
            with stage("attend", block):
                far, far_lse = call.space.attend(block, query, remote, rope, mask, scale)
            with stage("merge", block):
                both, _ = ak.merge_state(near, lse, far, far_lse)
                out = torch.cat([out[:, :, :first], both], 2) if first else both
        return out

    def send_codes(self, block: int, what: Any) -> None:
        """Codes of this rank's shard, packed into one frame for each rank that may see it."""
        call = self.call
        receivers = call.plan.receivers(call.rank)
        size = call.space.payload_bytes(block, call.batch, call.plan.num_sent(call.rank))
        if receivers and size:
            total = size + (call.missing.width if call.missing else 0)
            frame = call.frames.get(total) or call.frames.setdefault(total, call.mesh.buffer(total))
            with stage("encode", block):
                call.space.encode(block, what, call.local_rope, frame.payload[:size])
            if call.missing:
                call.missing.write_recent(frame.payload[size:])
            partial = call.missing is not None
            with stage("send", block):
                call.mesh.send(frame, block=block, plan=call.tag, to=receivers, partial=partial)

    def receive_codes(self, block: int) -> tuple[Any, Tensor | None]:
        """This block's codes of every rank whose shard is visible here, and which of their tokens
        attention may see: bool [B, N], None for all. Without any codes: `NOTHING`."""
        call = self.call
        sources = call.plan.sources(call.rank)
        if not sources:
            return NOTHING
        counts = {n: call.plan.num_sent(n) for n in sources}
        sizes = {n: call.space.payload_bytes(block, call.batch, counts[n]) for n in sources}
        views = dict.fromkeys(sources, memoryview(b""))  # what nobody sends, nobody awaits
        came: dict[int, Tensor] = {}
        if any(sizes.values()):
            with stage("wait", block):
                views, came = receive_codes(call, block, sizes)
        payloads = [
            Payload(views[n], counts[n], call.plan.num_received(call.rank, n), came.get(n))
            for n in sources
        ]
        with stage("unpack", block):
            remote = call.space.decode(block, payloads, call.batch, call.remote_rope)
        mask = seen(payloads, call.batch, call.remote_mask)
        received = remote, mask
        if came and mask is not None and not bool(mask.any()):
            received = NOTHING  # nobody's codes came
        if call.keeps:
            call.kept[block] = received
        return received

    def finish(self, hidden: Tensor) -> Tensor:
        """What the head needs of the final hidden states, from whichever ranks hold it."""
        call = self.call
        if call.decoding:
            return hidden
        read = gather(call, call.plan.without_halo(hidden, call.rank))
        return read.expand(-1, hidden.shape[1], -1) if call.pooled else read
