"""Images are prepared as a model's file says, or the file is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from astra_runtime.cli.leading import pooling_of
from astra_runtime.errors import AstraError
from astra_runtime.serve.images import Preparation
from astra_runtime.serve.service import RequestRefused

from ..models import tiny

Image = pytest.importorskip("PIL.Image")
CONFIG = tiny("vit", image_size=(8, 12), patch_size=4, num_channels=3).config


def prepared(folder: Path, said: dict[str, Any]) -> Preparation:
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return Preparation.of(CONFIG, str(folder))


def png(width: int, height: int) -> tuple[bytes, torch.Tensor]:
    values = torch.arange(height * width * 3) * 7 % 256
    pixels = values.view(height, width, 3).to(torch.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(data, "PNG")
    return data.getvalue(), pixels.permute(2, 0, 1).float()


def test_every_step_of_the_file_counts(tmp_path: Path) -> None:
    image, pixels = png(12, 8)
    torch.testing.assert_close(Preparation.of(CONFIG)(image)[0], pixels / 255 * 2 - 1)
    for said, want in (
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": 0.25}, None),
        ({"do_normalize": False}, pixels / 255),
        ({"do_normalize": False, "rescale_factor": 1 / 127.5}, pixels / 127.5),
        ({"do_normalize": False, "do_rescale": False}, pixels),
        ({"size": {"height": 8, "width": 12}, "resample": 3}, pixels / 255 * 2 - 1),
    ):
        got = prepared(tmp_path, said)(image)[0]
        if want is None:
            mean = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
            want = (pixels / 255 - mean) / 0.25
        torch.testing.assert_close(got, want)
    other, _ = png(20, 16)
    assert prepared(tmp_path, {"resample": 0})(other).shape == (1, 3, 8, 12)
    with pytest.raises(RequestRefused, match="expected 12 by 8 pixels"):
        prepared(tmp_path, {"do_resize": False})(other)


def test_grey_images_of_16_bits_keep_their_shades() -> None:
    """PIL clips them at 255, which leaves a white image."""
    shades = torch.arange(96, dtype=torch.int32).view(8, 12) * 65535 // 95
    data = io.BytesIO()
    Image.fromarray(shades.numpy().astype("uint16")).save(data, "PNG")
    got = Preparation.of(CONFIG)(data.getvalue())[0]
    assert float((got - (shades / 65535 * 2 - 1)).abs().max()) < 1 / 254


@pytest.mark.parametrize(
    "said",
    [
        {"do_center_crop": True},
        {"size": {"shortest_edge": 8}},
        {"size": {"height": 16, "width": 16}},
        {"image_mean": [0.5]},
        {"rescale_factor": 0},
        {"resample": 9},
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{next(iter(said))}|size"):
        prepared(tmp_path, said)


def test_text_vectors_are_made_as_the_folder_says(tmp_path: Path) -> None:
    assert pooling_of(str(tmp_path)) == "mean"
    folder = tmp_path / "1_Pooling"
    folder.mkdir()
    for said, want in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}, "mean"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
    ):
        (folder / "config.json").write_text(json.dumps(said))
        if want is None:
            with pytest.raises(AstraError, match="expected text vectors that are the mean"):
                pooling_of(str(tmp_path))
        else:
            assert pooling_of(str(tmp_path)) == want
    (folder / "config.json").unlink()
    dense = [{"type": "sentence_transformers.models.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(dense))
    with pytest.raises(AstraError, match="got Dense"):
        pooling_of(str(tmp_path))
