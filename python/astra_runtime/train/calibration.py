"""What a codebook is fitted on: a model's activations on calibration windows, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codes.layouts import flat, joint
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
    adapter: Adapter, space: str, windows: list[Inputs], progress: Progress, prefix: int = 0
) -> Recorded:
    """Runs the model by itself on every window, keeping what the space codes."""

    def run(window: Inputs) -> list[Any]:
        recorder = _Recorder(adapter, space, window, prefix)
        with torch.inference_mode(), adapter.listening(recorder):
            adapter.model(**window)
        return recorder.kept

    progress("calibrating", 0, len(windows))
    kept: list[list[Any]] = []
    with adapter.installed():
        for of_window in map_cores(run, windows):
            kept.append(of_window)
            progress("calibrating", len(kept), len(windows))
    return Recorded(adapter, space, kept)


class _Recorder:
    """A listener of one window: the block inputs, or the keys (not rotated) and values."""

    def __init__(self, adapter: Adapter, space: str, window: Inputs, prefix: int) -> None:
        self.copies, self.space = adapter.class_tokens + prefix, space
        positions = adapter.positions(window)
        self.rope: Rope = None if positions is None else adapter.rope(positions)
        self.kept: list[Any] = [None] * len(adapter.blocks)

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden

    def before_block(self, block: int, hidden: Tensor) -> None:
        if self.space != "kv":
            self.kept[block] = hidden[:, self.copies :].float()

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if self.space == "kv":
            plain = unrotate(key.float(), self.rope)
            self.kept[block] = (plain[:, :, self.copies :], value[:, :, self.copies :].float())

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden[:, :1]  # the head's work is not needed


@dataclass
class Recorded:
    """What was kept, by window and block. A block's part is freed when it is taken."""

    adapter: Adapter
    space: str
    kept: list[list[Any]]

    def pairs(self, block: int) -> Tensor:
        """Keys and values of a block, side by side as `transform.flat` puts them: [n, E]."""
        kept = [of_window[block] for of_window in self.kept]
        for of_window in self.kept:
            of_window[block] = None
        found = torch.cat([flat(key, value).flatten(0, 1) for key, value in kept])
        finite(found, block)
        return found

    def vectors(self, block: int, groups: int, shared: bool) -> tuple[Tensor, Tensor]:
        """The vectors [n, C, w] of a block, and the scales [Hkv, 2] they were multiplied with."""
        kept = [of_window[block] for of_window in self.kept]
        for of_window in self.kept:
            of_window[block] = None
        scales = torch.ones(self.adapter.num_key_value_heads, 2, device=self.adapter.device)
        if self.space != "kv":
            found = torch.cat([h.flatten(0, 1) for h in kept]).unflatten(-1, (groups, -1))
        else:
            key = torch.cat([k for k, _ in kept], 2)
            value = torch.cat([v for _, v in kept], 2)
            scales = balance(key, value)
            found = joint(key, value, scales, groups, shared).flatten(0, 1)
        finite(found, block)
        return found.contiguous(), scales


def finite(found: Tensor, block: int) -> None:
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"model: activations of block {block} are not finite on the calibration data"
        )


def balance(key: Tensor, value: Tensor) -> Tensor:
    """Scales [Hkv, 2] that give a head's keys and values the same total variance."""

    def deviation(tensor: Tensor) -> Tensor:
        flat = tensor.transpose(0, 1).flatten(1, 2)  # [Hkv, n, d]
        return (flat - flat.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt()

    return 1 / torch.stack([deviation(key), deviation(value)], -1).clamp(min=1e-6)
