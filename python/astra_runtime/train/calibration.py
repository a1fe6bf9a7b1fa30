"""What a codebook is fitted on: a model's activations on calibration windows, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..codes.layouts import merge_heads
from ..codes.packed import PackedCodes
from ..codes.rotary import Rope, unrotate
from ..inputs import check_inputs
from ..models import ROW, Adapter, Inputs
from ..parallel import map_cores

Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all


def as_windows(calibration: Tensor | Sequence[Tensor]) -> list[Inputs]:
    """Calibration data as the inputs of one forward pass each.

    Raises:
        TypeError: something else than tensors.
        ValueError: no window, or windows of another shape than token ids [T] or images [C, h, w].
    """
    if not isinstance(calibration, Tensor | Sequence):
        raise TypeError(f"calibration: expected tensors, got {type(calibration).__name__}")
    if isinstance(calibration, Tensor) and not calibration.dim():
        raise ValueError("calibration: expected windows, got a single number")
    windows = list(calibration)
    if not windows:
        raise ValueError("calibration: expected at least one window, got none")
    for window in windows:
        if not isinstance(window, Tensor):
            raise TypeError(f"calibration: expected tensors, got {type(window).__name__}")
        if window.is_meta:
            raise ValueError("calibration: expected tensors in memory, got one on the meta device")
    images = windows[0].is_floating_point()
    for window in windows:
        if window.is_floating_point() != images or window.dim() != (3 if images else 1):
            raise ValueError(
                "calibration: expected windows of token ids, integers [T], or images, [C, h, w], "
                f"got {window.dtype} of shape {list(window.shape)}"
            )
    name = "pixel_values" if images else "input_ids"
    return [{name: _as_long(window)[None]} for window in windows]


def _as_long(window: Tensor) -> Tensor:
    return window.long() if window.dtype == torch.int32 else window


def check_windows(
    adapter: Adapter, windows: list[Inputs], least: int, name: str = "calibration"
) -> list[Inputs]:
    """The windows on the model's device; `name` is the argument that they came by.

    Raises:
        ValueError: one that the model cannot take, or of fewer than `least` tokens, or windows that
            are all of one token.
    """
    windows = [on_device(window, adapter) for window in windows]
    for number, window in enumerate(windows):
        try:
            check_inputs(adapter, window)
        except ValueError as error:
            raise ValueError(f"{name}: window {number}: {error}") from error
        tokens = adapter.count(window)[1]
        if tokens < least:
            raise ValueError(
                f"{name}: expected windows of at least {least} tokens, got {tokens} in window "
                f"{number}"
            )
    bounds = torch.stack([torch.stack(next(iter(w.values())).aminmax()) for w in windows])
    if bool(bounds.min() == bounds.max()):
        raise ValueError(
            f"{name}: expected windows of several values, got {bounds.min().item():g} only"
        )
    return windows


def on_device(window: Inputs, adapter: Adapter) -> Inputs:
    """With the model's device, images with its dtype."""
    return {
        name: tensor.to(adapter.device, adapter.dtype if tensor.is_floating_point() else None)
        for name, tensor in window.items()
    }


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


def empty_pairs(
    adapter: Adapter, windows: Sequence[Inputs], prefix: int = 0
) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """Room for the keys and values of every block, side by side as `merge_heads` puts them.

    What is recorded is written at once where it stays: many small tensors that are kept, among
    large ones that are not, would scatter over several times the memory.

    Returns:
        The rows [n, E] of each block, and of each window the parts of them that are its own.
    """
    tokens = [adapter.count(window)[1] - prefix for window in windows]
    width = 2 * adapter.num_key_value_heads * adapter.head_dim
    rows = [
        torch.empty(sum(tokens), width, dtype=torch.float32, device=adapter.device)
        for _ in adapter.blocks
    ]
    return rows, list(zip(*(block.split(tokens) for block in rows), strict=True))


def record_pairs(
    adapter: Adapter,
    windows: list[Inputs],
    progress: Progress,
    prefix: int,
    parts: Sequence[Sequence[Tensor]],
) -> None:
    """Writes keys and values of every window, what `record` keeps, into its part of the rows."""

    def run(numbered: tuple[int, Inputs]) -> None:
        number, window = numbered
        recorder = _RowRecorder(adapter, window, prefix, parts[number])
        with torch.inference_mode(), adapter.listening(recorder):
            adapter.model(**window)

    progress("calibrating", 0, len(windows))
    with adapter.installed():
        for done, _ in enumerate(map_cores(run, list(enumerate(windows)))):
            progress("calibrating", done + 1, len(windows))


class _Recorder:
    """A listener of one window: the block inputs, or the keys (not rotated) and values."""

    def __init__(self, adapter: Adapter, inputs: bool, window: Inputs, prefix: int) -> None:
        self.copies, self.inputs = adapter.class_tokens + prefix, inputs
        self.row = adapter.head == ROW  # which looks for a token by its column
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
        if not bool(hidden.isfinite().all()):
            for block, recorded in enumerate(self.blocks):
                for tensor in [recorded] if self.inputs else recorded:
                    check_finite(tensor, block)
            raise ValueError("model: its output is not finite on the calibration data")
        first = hidden[:, :1]  # the head's work is not needed
        return first.expand(-1, hidden.shape[1], -1) if self.row else first


class _RowRecorder(_Recorder):
    """Of keys and values, which it writes into `rows`, [T, E] of every block."""

    def __init__(
        self, adapter: Adapter, window: Inputs, prefix: int, rows: Sequence[Tensor]
    ) -> None:
        super().__init__(adapter, False, window, prefix)
        self.rows = rows

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        plain = unrotate(key.float(), self.rope)[:, :, self.copies :]
        pairs = merge_heads(plain, value[:, :, self.copies :].float())
        self.rows[block].copy_(pairs.flatten(0, 1))
        self.blocks[block] = (self.rows[block],)


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

    def vectors(
        self, codec: type[PackedCodes], block: int, groups: int, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The vectors [n, C, w] of a block, and the scales [Hkv, 2] they were multiplied with."""
        vectors, scales = codec.training_vectors(self.take(block), groups, shared)
        check_finite(vectors, block)
        return vectors.contiguous(), scales


def check_weights(model: nn.Module) -> None:
    """Refuses weights that are not finite, by name."""
    broken = [name for name, w in model.named_parameters() if not bool(w.isfinite().all())]
    if broken:
        raise ValueError(f"model: weights that are not finite: {', '.join(broken[:3])}")


def check_finite(vectors: Tensor, block: int) -> None:
    if not bool(vectors.isfinite().all()):
        raise ValueError(
            f"model: activations of block {block} are not finite on the calibration data"
        )
