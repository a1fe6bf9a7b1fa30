"""The codes of this rank's shard on their way out: packed into frames, and sent to whoever may see
them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .codes.base import Pending
from .codes.staging import read_later
from .errors import NotFinite
from .inputs import all_finite
from .trace import stage
from .transport import Frame
from .transport.on_device import DeviceFrame


class Outgoing:
    """What one rank sends of each block in `call`."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._unsent: Callable[[], None] | None = None  # sends codes that are still being made

    def code(self, block: int, tensors: tuple[Tensor, ...]) -> None:
        """Packs the shard's codes into one frame for each rank that may see it; the next rank's
        ends in the fine codes of the tokens before it, if any. Sends them, unless a GPU is still
        making them: then `send` does.

        `tensors`: the shard's keys and values, or its block input where the codec is early.

        Raises NotFinite where they hold NaN or an infinity: the nearest codeword would hide it.
        """
        call = self.call
        size = call.sizes.payload[block].get(call.rank, 0)
        if not call.sizes.receivers:
            return
        what: Any = tensors[0] if call.codec.early else tensors
        if not size:
            call.codec.pass_over(block, what, call.views.sent_rope)
            return
        fine = call.sizes.fine[block][call.rank]
        frame = self._frame(size + fine)
        with stage("encode", block):
            out = frame.payload[: size + fine]
            pending = call.codec.encode(block, what, call.views.sent_rope, out)
            seen = call.codec.finite  # where encoding has looked at all of it anyway
            finite = all_finite(*tensors) if seen is None else seen
            if isinstance(frame, DeviceFrame):
                is_finite = self._flag_on_device(block, frame, finite)
            else:
                is_finite = read_later(finite)
        self._unsent = partial(self._send, block, frame, (size, fine), pending, is_finite)
        if pending is None:
            self.send()

    def send(self) -> None:
        """Sends the codes that a GPU was making while this rank queued its next work."""
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            unsent()

    def _flag_on_device(
        self, block: int, frame: DeviceFrame, finite: Tensor | bool
    ) -> Callable[[], bool]:
        """Codes that stay on the device leave unseen: the frame says whether they are finite."""
        frame.finite = torch.as_tensor(finite).all()
        self.call.mesh.check_later(frame.finite, self._not_finite(block))
        return lambda: True

    def _not_finite(self, block: int) -> NotFinite:
        rank = self.call.mesh.device_rank
        return NotFinite(rank, f"its tokens hold NaN or infinity in block {block}")

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
                send(self._without_fine(frame, size, fine), to=to[1:])
        call.keep_codes(call.rank, block, frame.payload[:size])

    def _without_fine(self, frame: Frame, size: int, fine: int) -> Frame:
        coarse = self._frame(size)
        coarse.payload[:size] = frame.payload[:size]
        coarse.payload[size:] = frame.payload[size + fine :]
        if isinstance(frame, DeviceFrame) and isinstance(coarse, DeviceFrame):
            coarse.finite = frame.finite
        return coarse

    def _frame(self, size: int) -> Frame:
        """A frame with room for `size` bytes of codes, used again by later blocks."""
        call, frames = self.call, self.call.state.frames
        total = size + (call.missing.width if call.missing else 0)
        if total not in frames:
            mesh = call.mesh
            frames[total] = mesh.device_buffer(total) if call.on_device else mesh.buffer(total)
        return frames[total]
