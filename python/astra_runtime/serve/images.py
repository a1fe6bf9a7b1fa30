"""Encoded images made ready for a vision model, as its `preprocessor_config.json` says."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import pair
from .service import RequestRefused

MAX_PIXELS = 1 << 26  # of an encoded image, before it is made smaller
FILE = "preprocessor_config.json"
_BILINEAR = 2  # as PIL and these files number the ways to resize


@dataclass(frozen=True)
class Preparation:
    """Resizing, scaling and normalizing.

    Attributes:
        size: height and width in pixels.
        channels: 1 or 3.
        mean, std: by channel, of scaled values.
        divisor: scales values of 0 to 255.
        resample: how an image of another size is resized, a number of PIL's; None: it is refused.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    divisor: float = 255
    resample: int | None = _BILINEAR

    @classmethod
    def of(cls, config: Any, folder: str | None = None) -> Preparation:
        """That of a model; without its file, mean and standard deviation are a half.

        Raises:
            ValueError: the file asks for something else than resizing to the model's size, scaling
                and normalizing.
        """
        size, channels = pair(config.image_size), int(config.num_channels)
        file = None if folder is None else Path(folder) / FILE
        found = json.loads(file.read_text()) if file is not None and file.is_file() else {}
        _check_steps(found, size)
        mean, std = (_by_channel(found, name, channels) for name in ("image_mean", "image_std"))
        if not found.get("do_normalize", True):
            mean, std = (0.0,) * channels, (1.0,) * channels
        resample = int(found.get("resample", _BILINEAR))
        return cls(
            size,
            channels,
            mean,
            std,
            _divisor(found),
            resample if found.get("do_resize", True) else None,
        )

    def __call__(self, image: bytes) -> Tensor:
        """fp32 [1, C, height, width] of a PNG or JPEG.

        Raises RequestRefused where the bytes are no such image.
        """
        from PIL import Image, UnidentifiedImageError

        if not isinstance(image, bytes | bytearray | memoryview):
            wanted = "expected the bytes of a PNG or JPEG"
            raise RequestRefused("image", f"{wanted}, got {type(image).__name__}")
        try:
            with Image.open(io.BytesIO(image), formats=("PNG", "JPEG")) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise RequestRefused("image", f"expected at most {MAX_PIXELS} pixels")
                plain = _eight_bits(opened).convert("L" if self.channels == 1 else "RGB")
                if plain.size != self.size[::-1]:
                    if self.resample is None:
                        raise RequestRefused(
                            "image",
                            f"expected {self.size[1]} by {self.size[0]} pixels, as the model does "
                            f"not resize, got {plain.width} by {plain.height}",
                        )
                    plain = plain.resize(self.size[::-1], Image.Resampling(self.resample))
        except Image.DecompressionBombError as error:
            raise RequestRefused("image", f"expected at most {MAX_PIXELS} pixels") from error
        except RequestRefused:
            raise
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise RequestRefused("image", f"expected a PNG or JPEG: {error}") from error
        data = torch.frombuffer(bytearray(plain.tobytes()), dtype=torch.uint8)
        pixels = data.view(*self.size, self.channels).permute(2, 0, 1).float() / self.divisor
        mean = torch.tensor(self.mean, dtype=torch.float32).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(-1, 1, 1)
        return ((pixels - mean) / std)[None]


def _eight_bits(image: Any) -> Any:
    """A grey image of 16 bits a pixel, of which PIL would make all values above 255 white, in 8."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _check_steps(found: dict[str, Any], size: tuple[int, int]) -> None:
    if found.get("do_center_crop"):
        raise ValueError(f"{FILE}: expected no do_center_crop, which is not supported, got one")
    if not found.get("do_resize", True):
        return
    asked = found.get("size", {"height": size[0], "width": size[1]})
    if isinstance(asked, dict):
        asked = (asked.get("height"), asked.get("width"))
    if asked != size and asked != size[0]:
        raise ValueError(
            f"{FILE}: expected the model's size, {size[0]} by {size[1]}, got {found['size']}"
        )
    if found.get("resample", _BILINEAR) not in range(6):
        raise ValueError(f"{FILE}: expected resample from 0 to 5, got {found['resample']!r}")


def _divisor(found: dict[str, Any]) -> float:
    if not found.get("do_rescale", True):
        return 1.0
    factor = found.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"{FILE}: expected a rescale_factor above 0, got {factor!r}")
    divisor = 1 / factor
    return round(divisor) if math.isclose(divisor, round(divisor), rel_tol=1e-6) else divisor


def _by_channel(found: dict[str, Any], name: str, channels: int) -> tuple[float, ...]:
    values = found.get(name, 0.5)
    values = [values] * channels if isinstance(values, int | float) else values
    if not isinstance(values, list) or len(values) != channels:
        raise ValueError(f"{FILE}: expected {name} of {channels} channels, got {values!r}")
    return tuple(float(value) for value in values)
