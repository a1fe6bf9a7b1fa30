"""Images of two digits, whose label needs both: scikit-learn's digits, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# scikit-learn's digits come in the order of their writers: other people wrote the later ones.
SIDE, DIGITS, CLASSES = 8, 2, 10  # pixels of a digit, digits of an image, labels
PARTS = {"train": (0, 1100), "validation": (1100, 1347), "test": (1347, 1797)}


@dataclass(frozen=True)
class Images:
    """Pixels fp32 [n, 1, 8, 16] within ±1, labels int64 [n], the digits int64 [n, 2]."""

    pixels: Tensor
    labels: Tensor
    digits: Tensor


def largest(digits: Tensor) -> Tensor:
    """The larger of the two: one digit alone does not say it."""
    return digits.amax(-1)


def left(digits: Tensor) -> Tensor:
    """The easy case: one digit says it all."""
    return digits[:, 0]


TASKS: dict[str, Callable[[Tensor], Tensor]] = {"largest": largest, "left": left}


def load(part: str) -> tuple[Tensor, Tensor]:
    """Single digits of a part: pixels [n, 8, 8] within ±1, and which digit, [n]."""
    from sklearn.datasets import load_digits

    digits, which = load_digits(), slice(*PARTS[part])
    pixels = torch.from_numpy(digits.images[which]).float() / 8 - 1
    return pixels, torch.from_numpy(digits.target[which]).long()


def compose(part: str, count: int, task: str, seed: int, shift: int = 0) -> Images:
    """`count` images of two digits drawn from a part, each moved by up to `shift` pixels."""
    pixels, kinds = load(part)
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(pixels), (count, DIGITS), generator=draw)
    tiles = F.pad(pixels, (shift,) * 4, value=-1.0)[chosen]
    if shift:
        moves = torch.randint(2 * shift + 1, (2, count, DIGITS, 1), generator=draw)
        rows, columns = moves + torch.arange(8)  # [count, 2, 8] each
        tiles = tiles.gather(2, rows[..., None].expand(-1, -1, -1, tiles.shape[-1]))
        tiles = tiles.gather(3, columns[..., None, :].expand(-1, -1, 8, -1))
    whole = tiles.transpose(1, 2).reshape(count, 1, 8, 16)
    digits = kinds[chosen]
    return Images(whole.contiguous(), TASKS[task](digits), digits)
