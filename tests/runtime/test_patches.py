"""A rank embeds the patches of its own shard, and a picture's tokens are what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from astra_runtime import Codebook, Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt
from astra_runtime.models.patches import PatchRows, patch_product
from tests.runtime.models import inputs_for, tiny


@pytest.mark.parametrize("patches", [slice(0, 3), slice(3, 9), slice(7, 15), slice(0, 15)])
def test_rows_that_are_needed_are_what_they_would_be(patches: slice) -> None:
    torch.manual_seed(0)
    product = nn.Conv2d(3, 8, (4, 2), stride=(4, 2))
    pixels = torch.randn(2, 3, 21, 10)  # 5 rows of 5 patches, and a line of pixels left over
    with torch.inference_mode():
        whole = product(pixels)
        rows = PatchRows(patches, (4, 2))
        cropped = rows.crop(pixels)
        filled = rows.fill(product(cropped))
    assert cropped.shape[2] == 4 * (-(-patches.stop // 5) - patches.start // 5)
    assert filled.shape == whole.shape
    needed = (filled - whole).flatten(2)[:, :, patches]
    assert float(needed.abs().max()) < 1e-6


def heights(model: Any, ranks: int) -> tuple[list[int], list[torch.Tensor]]:
    """Of the pictures that the ranks' products were given, and every rank's logits."""
    seen: list[int] = []
    product = model.base_model.embeddings.patch_embeddings.projection
    own = type(product)._conv_forward

    class Counted(nn.Conv2d):
        def _conv_forward(self, pixels: Any, *given: Any) -> Any:
            seen.append(pixels.shape[2])
            return own(self, pixels, *given)

    def work(mesh: Any) -> torch.Tensor:
        with Engine(model, Codebook.dense(), mesh) as engine:
            return engine(**inputs_for("vit")).logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", Counted._conv_forward)
        return seen, run_ranks(ranks, work, timeout=30)


def test_ranks_embed_their_own_rows() -> None:
    model = tiny("vit")
    with torch.inference_mode():
        exact = model(**inputs_for("vit")).logits
    height = inputs_for("vit")["pixel_values"].shape[2]
    patch = model.config.patch_size
    seen, answers = heights(model, 2)
    assert len(seen) == 2
    assert all(given < height for given in seen)
    assert height <= sum(seen) <= height + patch  # of one row both may have patches
    for logits in answers:
        assert float((logits - exact).abs().max()) < 1e-4


def test_a_patched_product_is_given_the_whole_picture() -> None:
    model = tiny("vit")
    embeddings = model.base_model.embeddings
    kernel = embeddings.patch_embeddings.projection.kernel_size
    assert patch_product(embeddings, kernel) is not None
    assert patch_product(embeddings, (kernel[0] + 1, kernel[1])) is None
    handle = embeddings.patch_embeddings.projection.register_forward_hook(
        lambda module, args, output: output.roll(1, 2)
    )
    assert adapt(model).patch_product() is None
    with torch.inference_mode():
        exact = model(**inputs_for("vit")).logits
    seen, answers = heights(model, 2)
    assert seen == [inputs_for("vit")["pixel_values"].shape[2]] * 2
    for logits in answers:
        assert float((logits - exact).abs().max()) < 1e-4
    handle.remove()
    assert patch_product(embeddings, kernel) is not None
