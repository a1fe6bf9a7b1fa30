"""Encoded images made ready for a vision model, as its `preprocessor_config.json` says."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .service import RequestRefused

MAX_PIXELS = 1 << 26  # of an encoded image, before it is made smaller


@dataclass(frozen=True)
class Preparation:
    """Resizing, scaling and normalizing.

    Attributes:
        size: height and width in pixels.
        channels: 1 or 3.
        mean, std: by channel, of values from 0 to 1.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, config: Any, folder: str | None = None) -> Preparation:
        """That of a model; without its file, mean and standard deviation are a half."""
        side = config.image_size
        size = (side, side) if isinstance(side, int) else (side[0], side[1])
        channels = int(config.num_channels)
        file = None if folder is None else Path(folder) / "preprocessor_config.json"
        found = json.loads(file.read_text()) if file is not None and file.is_file() else {}
        mean, std = (found.get(name, [0.5] * channels) for name in ("image_mean", "image_std"))
        return cls(size, channels, tuple(mean), tuple(std))

    def __call__(self, image: bytes) -> Tensor:
        """fp32 [1, C, height, width] of a PNG or JPEG.

        Raises RequestRefused where the bytes are no such image.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(image), formats=("PNG", "JPEG")) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise RequestRefused("image", f"expected at most {MAX_PIXELS} pixels")
                plain = opened.convert("L" if self.channels == 1 else "RGB")
                resized = plain.resize(self.size[::-1], Image.Resampling.BILINEAR)
        except Image.DecompressionBombError as error:
            raise RequestRefused("image", f"expected at most {MAX_PIXELS} pixels") from error
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise RequestRefused("image", f"expected a PNG or JPEG: {error}") from error
        data = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels = data.view(*self.size, self.channels).permute(2, 0, 1).float() / 255
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return ((pixels - mean) / std)[None]
