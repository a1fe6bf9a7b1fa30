"""Packed codes between a GPU and the network: through pinned memory, on a stream of their own.

The stream that the model computes in never waits for a copy to the host, and the host waits for one
thing alone in a block: that the bytes it is about to send have come. Codes cross as they are sent,
packed, once each way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import astra_kernels as ak

from .base import Pending


def stays_packed(device: torch.device) -> bool:
    """Whether codes are packed and unpacked on `device`, where the kernels can do both."""
    return device.type == "cuda"


def packed_right(rows: Tensor, count: int, bits: int, codewords: int) -> Tensor:
    """What `wire.check_codes` looks at, on a device: whether rows uint8 [B, bytes] of `count` codes
    have nothing behind the last code, and no code that no codebook has. Bool, a scalar there."""
    right = torch.ones((), dtype=torch.bool, device=rows.device)
    behind = count * bits % 8
    if behind:
        right = right & (rows[:, -1] >> behind == 0).all()
    if count and codewords < 1 << bits:
        for row in rows:
            right = right & (ak.unpack(row, bits, count) < codewords).all()
    return right


def read_later(flag: Tensor | bool) -> Callable[[], bool]:
    """Whether all of a bool tensor is true, read without waiting for what is queued behind it."""
    if isinstance(flag, bool) or flag.device.type != "cuda":
        value = bool(flag) if isinstance(flag, bool) else bool(flag.all())
        return lambda: value
    copy = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True, device="cpu")
    copy.copy_(flag, non_blocking=True)
    copied = torch.cuda.current_stream(flag.device).record_event()

    def read() -> bool:
        copied.synchronize()
        return bool(copy.all())

    return read


@dataclass(frozen=True, eq=False)
class ReceivedCodes:
    """Codes on a device, as ranks packed them.

    Attributes:
        data: uint8 [B, bytes], the codes of each source rank from a byte on.
        counts: how many tokens of each source there are.
        groups, bits: C, and the bits of a code.
    """

    data: Tensor
    counts: tuple[int, ...]
    groups: int
    bits: int

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def joined(self) -> bool:
        """Whether the sources' codes follow each other without a gap, as those of one rank do."""
        return all(count * self.groups * self.bits % 8 == 0 for count in self.counts[:-1])

    def unpacked(self) -> Tensor:
        """int32 [B, N, C]."""
        return torch.stack([self._row(row) for row in self.data])

    def _row(self, row: Tensor) -> Tensor:
        parts, start = [], 0
        for count in self.counts:
            size = ak.packed_size(count * self.groups, self.bits)
            part = row[start : start + size]
            parts.append(ak.unpack(part, self.bits, count * self.groups).view(count, self.groups))
            start += size
        return torch.cat(parts)


class Staging:
    """Copies of payloads to and from one device. One thread uses it; on a CPU it copies at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        # by use and size; and as the host writes and reads them
        self._buffers: dict[tuple[str, int], tuple[Tensor, memoryview]] = {}
        self._uploaded: Any = None  # the last copy from a buffer that is written again

    def download(self, packed: Tensor, out: memoryview) -> Pending:
        """Begins to copy uint8 `packed` into `out`; what is returned waits for it."""
        flat = packed.reshape(-1)
        buffer, content = self._buffer("out", flat.numel())
        with self._aside():
            buffer.copy_(flat, non_blocking=True)
            copied = self._mark()

        def wait(source: Tensor = flat) -> None:  # whose memory is nobody else's until then
            if copied is not None:
                copied.synchronize()
            out[:] = content

        return wait

    def upload(self, pieces: Sequence[Sequence[memoryview]]) -> Tensor:
        """Rows on the device, uint8 [B, bytes]: row b is the b-th of all pieces, joined."""
        if self._uploaded is not None:
            self._uploaded.synchronize()
        size = sum(len(piece) for piece in pieces[0])
        buffer, content = self._buffer("in", len(pieces) * size)
        buffer, start = buffer.view(len(pieces), size), 0
        for views in pieces:
            for view in views:
                content[start : start + len(view)] = view
                start += len(view)
        if self.stream is None:
            return buffer.clone()
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            rows = buffer.to(self.device, non_blocking=True)
            self._uploaded = self._mark()
        here.wait_event(self._uploaded)
        rows.record_stream(here)
        return rows

    def _buffer(self, use: str, size: int) -> tuple[Tensor, memoryview]:
        key = (use, size)
        if key not in self._buffers:
            pinned = self.stream is not None
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned, device="cpu")
            self._buffers[key] = buffer, buffer.numpy().data
        return self._buffers[key]

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """In the copies' stream, behind what was queued so far."""
        if self.stream is None:
            yield
            return
        made = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(made)
            yield

    def _mark(self) -> Any:
        return None if self.stream is None else self.stream.record_event()
