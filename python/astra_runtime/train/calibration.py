"""What a codebook is fitted on: a model's activations on calibration windows, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codes.layouts import merge_heads
from ..codes.packed import PackedCodes
from ..codes.rotary import Rope, unrotate
from ..models import Adapter, Inputs
from ..parallel import map_cores

Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all


def as_windows(calibration: Tensor | Sequence[Tensor]) -> list[Inputs]:
    """Calibration data as the inputs of one forward pass each."""
    windows = list(calibration)
    if not windows:
        raise ValueError("calibration: expected at least one window, got none")
    if windows[0].is_floating_point():
        return [{"pixel_values": window[None]} for window in windows]
    return [{"input_ids": window[None]} for window in windows]


def record(
    adapter: Adapter, inputs: bool, windows: list[Inputs], progress: Progress, prefix: int = 0
) -> Recorded:
    """Runs the model by itself on every window, keeping each block's inputs or its keys and values.

    `inputs` says which: `Codec.early`.
    """

    def run(window: Inputs) -> list[Any]:
        recorder = _Recorder(adapter, inputs, window, prefix)
        with torch.inference_mode(), adapter.listening(recorder):
            adapter.model(**window)
        return recorder.blocks

    progress("calibrating", 0, len(windows))
    by_window: list[list[Any]] = []
    with adapter.installed():
        for blocks in map_cores(run, windows):
            by_window.append(blocks)
            progress("calibrating", len(by_window), len(windows))
    return Recorded(adapter, by_window)


class _Recorder:
    """A listener of one window: the block inputs, or the keys (not rotated) and values."""

    def __init__(self, adapter: Adapter, inputs: bool, window: Inputs, prefix: int) -> None:
        self.copies, self.inputs = adapter.class_tokens + prefix, inputs
        positions = adapter.positions(window)
        self.rope: Rope = None if positions is None else adapter.rope(positions)
        self.blocks: list[Any] = [None] * len(adapter.blocks)

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden

    def before_block(self, block: int, hidden: Tensor) -> None:
        if self.inputs:
            self.blocks[block] = hidden[:, self.copies :].float()

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if not self.inputs:
            plain = unrotate(key.float(), self.rope)
            self.blocks[block] = (plain[:, :, self.copies :], value[:, :, self.copies :].float())

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden[:, :1]  # the head's work is not needed


@dataclass
class Recorded:
    """What was recorded, by window and block. A block's part is freed when it is taken."""

    adapter: Adapter
    by_window: list[list[Any]]

    def take(self, block: int) -> list[Any]:
        """Of each window: the block's input [1, T, D], or its keys and values [1, Hkv, T, d]."""
        taken = [blocks[block] for blocks in self.by_window]
        for blocks in self.by_window:
            blocks[block] = None
        return taken

    def pairs(self, block: int) -> Tensor:
        """Keys and values of a block, side by side as `merge_heads` puts them: [n, E]."""
        y = torch.cat([merge_heads(key, value).flatten(0, 1) for key, value in self.take(block)])
        check_finite(y, block)
        return y

    def vectors(
        self, codec: type[PackedCodes], block: int, groups: int, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The vectors [n, C, w] of a block, and the scales [Hkv, 2] they were multiplied with."""
        vectors, scales = codec.training_vectors(self.take(block), groups, shared)
        check_finite(vectors, block)
        return vectors.contiguous(), scales


def check_finite(vectors: Tensor, block: int) -> None:
    if not bool(vectors.isfinite().all()):
        raise ValueError(
            f"model: activations of block {block} are not finite on the calibration data"
        )
