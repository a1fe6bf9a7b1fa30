"""Frames that stay on a device: codes go from one GPU's memory to another's, past the hosts.

The frame is what it is over sockets, 28 bytes of header and the payload, in one tensor. The host
writes its header, and never waits for a frame: what it has to know of the frames that came, their
headers and flags that were computed beside the codes, it reads in one copy before the answer of a
call leaves, see `LaterChecks`. Codes are used unchecked until then, which harms nobody: kernels
read inside of their tables whatever the codes, and of a call that fails nothing is answered.

On a CPU all of this runs at once, with the same bytes. Only on GPUs can be seen whether a launch in
the stream of `Aside` lets the exchange run beside local attention, as it is meant to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from astra_runtime import wire
from astra_runtime.errors import AstraError, NotFinite
from astra_runtime.wire import HEADER_SIZE, Frame, Header


class DeviceFrame(Frame):
    """A reusable frame whose payload is a tensor, uint8 [size]: write into it, then `send` it.

    `finite`: a bool tensor on the device, whether what the payload stands for is; set before
    sending. Where it is not, the header says so in place of its block.
    """

    __slots__ = ("finite",)

    payload: Tensor  # type: ignore[assignment]

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.moment = None
        self.data = memoryview(bytearray(HEADER_SIZE))
        self.payload = torch.empty(size, dtype=torch.uint8, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def write(self, out: Tensor) -> None:
        """Queues copies of the stamped header and of the payload into `out`, uint8 [28 + size]."""
        both = bytearray(self.data) + wire.not_finite(self.data)
        headers = torch.frombuffer(both, dtype=torch.uint8)
        if out.device.type == "cuda":
            headers = headers.pin_memory()  # whose memory is free again when the copy is done
        finite, not_finite = headers.to(out.device, non_blocking=True).view(2, HEADER_SIZE)
        out[:HEADER_SIZE] = torch.where(self.finite, finite, not_finite)
        out[HEADER_SIZE:] = self.payload


class LaterChecks:
    """What the host has yet to look at of a call, in the order in which it came up."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._judges: list[Callable[[bytes], None]] = []

    def clear(self) -> None:
        self._tensors, self._judges = [], []

    def add_flag(self, flag: Tensor, error: AstraError) -> None:
        """`error` is raised if a bool tensor is False."""

        def judge(data: bytes) -> None:
            if not data[0]:
                raise error

        self._add(flag.reshape(1).view(torch.uint8), judge)

    def add_header(self, header: Tensor, expected: Header) -> None:
        """The header of a frame that came: WireError if it is another one, NotFinite if it says
        that the payload stands for no finite numbers."""

        def judge(data: bytes) -> None:
            if data == wire.not_finite(wire.encode_header(expected)):
                reason = f"its tokens hold NaN or infinity in block {expected.block}"
                raise NotFinite(expected.source, reason)
            wire.check_header(data, expected)

        self._add(header.clone(), judge)  # not a view, which would keep the payload

    def _add(self, tensor: Tensor, judge: Callable[[bytes], None]) -> None:
        self._tensors.append(tensor)
        self._judges.append(judge)

    def run(self) -> None:
        """Waits for the device, and raises the first error that there is."""
        if not self._tensors:
            return
        content = memoryview(torch.cat(self._tensors).cpu().numpy().tobytes())
        sizes, judges = [len(tensor) for tensor in self._tensors], self._judges
        self.clear()
        for size, judge in zip(sizes, judges, strict=True):
            judge(bytes(content[:size]))
            content = content[size:]


class Aside:
    """A stream beside the one that a model computes in, for launches that wait only for what they
    need of it; on a CPU there is none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def exists(self) -> bool:
        return self._stream is not None

    def follow(self) -> None:
        """What is launched from now on waits for all that is queued by now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def launching(self) -> contextlib.AbstractContextManager[Any]:
        if self._stream is None:
            return contextlib.nullcontext()
        return torch.cuda.stream(self._stream)

    def hand_over(self, tensor: Tensor) -> None:
        """A tensor made here is used in the current stream, and its memory not before that."""
        if self._stream is not None:
            tensor.record_stream(torch.cuda.current_stream(self._device))
