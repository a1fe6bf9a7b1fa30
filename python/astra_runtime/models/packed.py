"""Linear layers of fp32 whose weights were put in order once, for products of few rows.

A product of fp32 reads its weights in another order than they are kept in, so torch's own copies
them each time, which costs as much as the product where there are few rows. MKL, which torch has on
x86, can keep a copy in that order: products of 4 to 64 rows are then 1.3 to 2 times as fast, and of
1,025 still 1.07 times. The copy is as large as the weights, and up to 2 MiB a layer larger where
the kernel has huge pages.

For the time of a call, and no longer, the layers' `forward` reads the copy. A later write to the
weights would not reach it; engines refuse such a model, see `Watch`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from .during_calls import CallForward

ORDERED_FOR: Final = 1024  # rows: the order that was fastest for any number of them
LEAST_ROWS: Final = 4  # with fewer, reading the weights takes all the time
LEAST_WEIGHTS: Final = 1 << 16  # of a layer that is worth a copy
_PAGE: Final = 2 << 20  # a huge one, up to which the copy of a layer takes memory


_FORWARD: Final = nn.Linear.forward
_FUNCTION: Final = torch._C._nn.linear  # what torch.nn.functional.linear is, unless patched


def computes_as_torch() -> bool:
    """Whether linear layers are what torch made them: nobody has patched their class or their
    function, or follows functions of torch by a mode."""
    modes = range(torch._C._len_torch_function_stack())
    plain = nn.Linear.forward is _FORWARD and F.linear is _FUNCTION
    return plain and all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in modes)


def can_pack() -> bool:
    """Whether this torch has MKL's products."""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


def packable(blocks: Iterable[nn.Module]) -> list[nn.Linear]:
    """The layers of these blocks that are worth a copy."""
    layers = (module for block in blocks for module in block.modules())
    return [layer for layer in layers if type(layer) is nn.Linear and _fits(layer.weight)]


def _fits(weight: Tensor) -> bool:
    plain = weight.is_cpu and weight.dtype == torch.float32 and weight.is_contiguous()
    return plain and type(weight) is nn.Parameter and weight.numel() >= LEAST_WEIGHTS


def bytes_of(layers: Iterable[nn.Linear]) -> int:
    """Memory that the copies of these layers take, or a little less."""
    return sum(layer.weight.nbytes + _PAGE for layer in layers)


class PackedForward(CallForward):
    """The `forward` of a linear layer by MKL's product, where no gradient is asked for."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.layer, self.weight = layer, layer.weight
        with torch.no_grad():
            self.packed = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight, ORDERED_FOR)

    def __call__(self, *given: Any, **named: Any) -> Any:
        layer = self.layer
        if len(given) != 1 or named or not computes_as_torch():
            return self.own(*given, **named)
        vectors: Tensor = given[0]
        rows = vectors.numel() // max(1, vectors.shape[-1])
        if (
            rows < LEAST_ROWS
            or layer.weight is not self.weight
            or vectors.dtype != torch.float32
            or vectors.shape[-1] != layer.in_features
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return F.linear(vectors, layer.weight, layer.bias)
        product: Tensor = torch.ops.mkl._mkl_linear(
            vectors, self.packed, self.weight, layer.bias, rows
        )
        return product
