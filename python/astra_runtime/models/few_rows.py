"""Linear layers of fp32 by a product that reads weights as they are stored.

Torch's product copies a layer's weights into another order first, every time, which takes as long
as the product where there are few rows: a rank of many, or a step of a few sequences. The one in
C++ orders the rows instead (`csrc/src/product.cpp`), for no memory. Of many rows it serves where
torch's runs without AVX-512.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astra_kernels import _direct as direct

from .during_calls import CallForward
from .packed import computes_as_torch, packable


class FewRowsForward(CallForward):
    """The `forward` of a linear layer, where no gradient is asked for."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        layer: Any = self.module
        if len(given) != 1 or named or not computes_as_torch():
            return self.own(*given, **named)
        vectors: Tensor = given[0]
        rows = vectors.numel() // max(1, vectors.shape[-1]) if vectors.dim() else 0
        if direct.LEAST_ROWS <= rows <= direct.MOST_ROWS and not torch.is_autocast_enabled("cpu"):
            return direct.linear(vectors, layer.weight, layer.bias)
        return F.linear(vectors, layer.weight, layer.bias)


def few_rows_forwards(blocks: Iterable[nn.Module]) -> list[CallForward]:
    """Of the layers of these blocks that are worth it, where the C++ was measured."""
    return [FewRowsForward(layer) for layer in packable(blocks)] if direct.HAS_PRODUCT else []
