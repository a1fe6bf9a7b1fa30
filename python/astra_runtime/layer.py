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

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from astra_kernels import _direct as direct

from .call import Call
from .codes.base import Payload, Pending, visible_tokens
from .codes.staging import read_later
from .codes.verify import check_projection
from .errors import NotFinite
from .exchange import compare_pictures, gather, receive_payloads
from .inputs import all_finite
from .trace import stage
from .transport import Frame
from .transport.on_device import DeviceFrame

NOTHING = (None, None)  # nothing is known of remote tokens


class Layer:
    """The Transformer blocks of one rank during `call`; the model's hooks call it."""

    keeps_codes = False  # `sent` and `received` keep bytes, which so have to come to the host

    def __init__(self, call: Call) -> None:
        self.call = call
        self._on_device = call.on_device and not self.keeps_codes
        self._unsent: Callable[[], None] | None = None  # sends codes that are still being made
        self._input: Tensor | None = None  # of the block, where its projection is to be verified

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
            sent = hidden[:, call.sizes.sent_slice]
            if call.verified is not None:
                call.codec.check_input(block, sent)
                self._input = hidden
            self.send_codes(block, (sent,))

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Mixed-precision attention: [B, H, M, d] over local [B, Hkv, L, d] and remote tokens."""
        call, decoding = self.call, self.call.state.decoding
        if call.keeps_local:
            call.state.local[block] = key, value
        self._verify(block, key, value)
        if not (call.codec.early or decoding):
            sent = call.sizes.sent_slice
            self.send_codes(block, (key[:, :, sent], value[:, :, sent]))
        local, local_lse = self._attend_locally(block, query, key, value, scale)
        self._send_made()
        remote, mask = (
            call.state.remote.get(block, NOTHING) if decoding else self.receive_codes(block)
        )
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

    def _verify(self, block: int, key: Tensor, value: Tensor) -> None:
        call, hidden, self._input = self.call, self._input, None
        if call.verified is not None and hidden is not None and call.sizes.receivers:
            sent, rope = call.sizes.sent_slice, call.views.local_rope
            check_projection(call.verified, block, hidden, (key, value), sent, rope)

    def _attend_locally(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        call, mask = self.call, self.call.views.local_mask
        causal = call.plan.causal and not call.state.decoding
        if mask is not None:
            mask = mask[:, : key.shape[2]]
        with stage("attend", block):
            return direct.attention(query, key, value, is_causal=causal, key_mask=mask, scale=scale)

    def send_codes(self, block: int, tensors: tuple[Tensor, ...]) -> None:
        """Codes of this rank's shard, packed into one frame for each rank that may see it; the next
        rank's ends in the fine codes of the tokens before it, if any.

        `tensors`: the shard's keys and values, or its block input where the codec is early.

        Raises NotFinite where they hold NaN or an infinity: the nearest codeword would hide it.
        """
        call = self.call
        size = call.sizes.payload[block].get(call.rank, 0)
        if not (call.sizes.receivers and size):
            return
        fine = call.sizes.fine[block][call.rank]
        frame = self._frame(size + fine)
        with stage("encode", block):
            what: Any = tensors[0] if call.codec.early else tensors
            out = frame.payload[: size + fine]
            pending = call.codec.encode(block, what, call.views.local_rope, out)
            looked = call.codec.finite
            finite = all_finite(*tensors) if looked is None else looked
            if isinstance(frame, DeviceFrame):
                is_finite = self._tell_later(block, frame, finite)
            else:
                is_finite = read_later(finite)
        self._unsent = partial(self._send, block, frame, (size, fine), pending, is_finite)
        if pending is None:
            self._send_made()

    def _tell_later(
        self, block: int, frame: DeviceFrame, finite: Tensor | bool
    ) -> Callable[[], bool]:
        """Codes that stay on the device leave unseen; the frame itself says what they are worth."""
        frame.finite = torch.as_tensor(finite).all()
        self.call.mesh.check_later(frame.finite, self._not_finite(block))
        return lambda: True

    def _not_finite(self, block: int) -> NotFinite:
        rank = self.call.mesh.device_rank
        return NotFinite(rank, f"its tokens hold NaN or infinity in block {block}")

    def _send_made(self) -> None:
        """Sends the codes that a GPU was making while this rank queued its next work."""
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            unsent()

    def _send(
        self,
        block: int,
        frame: Frame,
        sizes: tuple[int, int],
        pending: Pending | None,
        is_finite: Callable[[], bool],
    ) -> None:
        call = self.call
        with stage("send", block):
            if pending is not None:
                pending()
            if not is_finite():
                raise self._not_finite(block)
            size, fine = sizes
            if call.missing:
                call.missing.write_recent(frame.payload[size + fine :])
            send = partial(
                call.mesh.send, block=block, plan=call.tag, partial=call.missing is not None
            )
            to = call.sizes.receivers  # the next rank first: it is waiting for this rank alone
            send(frame, to=to[:1] if fine else to)
            if fine and len(to) > 1:
                coarse = self._frame(size)
                coarse.payload[:size] = frame.payload[:size]
                coarse.payload[size:] = frame.payload[size + fine :]
                if isinstance(frame, DeviceFrame) and isinstance(coarse, DeviceFrame):
                    coarse.finite = frame.finite
                send(coarse, to=to[1:])
        self.sent(block, frame.payload[: sizes[0]])

    def sent(self, block: int, payload: memoryview) -> None:
        """The codes of this rank's shard have left; for layers that keep them."""

    def _frame(self, size: int) -> Frame:
        """A frame with room for `size` bytes of codes, used again by later blocks."""
        call, frames = self.call, self.call.state.frames
        total = size + (call.missing.width if call.missing else 0)
        if total not in frames:
            mesh = call.mesh
            frames[total] = mesh.device_buffer(total) if self._on_device else mesh.buffer(total)
        return frames[total]

    def receive_codes(self, block: int) -> tuple[Any, Tensor | None]:
        """This block's codes of every rank whose shard is visible here, and which of their tokens
        attention may see: bool [B, N], None for all. Without any codes: `NOTHING`."""
        call = self.call
        if not call.sizes.sources:
            if self._on_device:  # what was sent would wait for something that is received
                call.mesh.receive_on_device({}, block=block, plan=call.tag)
            return NOTHING
        compare_pictures(call)
        payloads = receive_payloads(call, block, self._on_device)
        self.received(block, payloads)
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

    def received(self, block: int, payloads: Sequence[Payload]) -> None:
        """Codes of other ranks' shards have come; for layers that keep them."""

    def finish(self, hidden: Tensor) -> Tensor:
        """What the head needs of the final hidden states, from whichever ranks hold it."""
        call = self.call
        if call.state.decoding:
            return hidden
        compare_pictures(call)
        if self._on_device:  # before anybody has an answer
            call.mesh.check_received()
        read = gather(call, call.plan.without_halo(hidden, call.rank))
        return read.expand(-1, hidden.shape[1], -1) if call.pooled else read
