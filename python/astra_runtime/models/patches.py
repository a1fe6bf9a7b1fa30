"""Patches of a picture that a rank need not embed: those outside of its shard.

Every rank has the whole picture, and a model's own forward pass embeds all of it: of ViT-Base at
1,024 patches that takes as long as a sixth of a rank's blocks where there are 32 ranks. The product
that makes patches is given the rows of the picture that the shard lies in; zeros stand for the
other patches until they are cut off, right behind the embedding.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .projection import is_plain


class PatchRows:
    """The rows of patches of one pass of one rank.

    Args:
        patches: those of the shard, in the order of the rows.
        kernel: height and width of a patch, in pixels.
    """

    def __init__(self, patches: slice, kernel: tuple[int, int]) -> None:
        self.patches, self.kernel = patches, kernel
        self._before = self._behind = 0  # rows that are left out

    def crop(self, pixels: Tensor) -> Tensor:
        """The pixels [B, C, h, W] of those rows, of a picture [B, C, H, W]."""
        height, width = (pixels.shape[2 + n] // self.kernel[n] for n in (0, 1))
        first, last = self.patches.start // width, -(-self.patches.stop // width)
        self._before, self._behind = first, height - last
        return pixels[:, :, first * self.kernel[0] : last * self.kernel[0]]

    def fill(self, embedded: Tensor) -> Tensor:
        """All rows [B, D, H, W], in patches, of those that were embedded."""
        return F.pad(embedded, (0, 0, self._before, self._behind))


def patch_product(embeddings: Any, kernel: tuple[int, int]) -> nn.Module | None:
    """The product of a ViT's embeddings that makes patches of `kernel` pixels; None where anything
    but it, positions and the class token may come between pixels and tokens."""
    from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTPatchEmbeddings

    if not is_plain(embeddings, ViTEmbeddings):
        return None
    patches: Any = embeddings.patch_embeddings
    product: Any = patches.projection if is_plain(patches, ViTPatchEmbeddings) else None
    if product is None or not is_plain(product, nn.Conv2d):
        return None
    apart = product.stride == product.kernel_size == kernel and product.dilation == (1, 1)
    return product if apart and product.padding == (0, 0) else None
