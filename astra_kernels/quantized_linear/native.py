"""Linear layers of integer weights on a CPU in C++; the weights are read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from astra_kernels import _C


def quantized_linear(
    vectors: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None
) -> Tensor:
    rows = vectors.float().contiguous()
    inputs, outputs = rows.shape[-1], weight.shape[0]
    tensors = [weight, scale, minimum, bias]
    kept = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    values, scales, minima, added = (0 if tensor is None else tensor.data_ptr() for tensor in kept)
    out = torch.empty(vectors.shape[:-1] + (outputs,), dtype=torch.float32, device="cpu")
    _C.quantized_linear(
        rows.data_ptr(),
        values,
        scales,
        minima,
        added,
        out.data_ptr(),
        rows=out.numel() // max(1, outputs),
        inputs=inputs,
        outputs=outputs,
        groups=scale.shape[1],
        bits=4 if weight.dtype == torch.uint8 else 8,
        half_scales=scale.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
    )
    return out.to(vectors.dtype)


def quantized_linears(vectors: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """The same for several layers of as many groups, whose inputs are rounded once.

    layers: with `weight`, `scale`, `minimum` and `bias`, all contiguous.
    """
    rows = vectors.float().contiguous()
    inputs, groups = rows.shape[-1], layers[0].scale.shape[1]
    outs, parts = [], []
    for layer in layers:
        weight, scale, minimum, bias = layer.weight, layer.scale, layer.minimum, layer.bias
        out = rows.new_empty((*vectors.shape[:-1], weight.shape[0]))
        addresses = (
            *(weight.data_ptr(), scale.data_ptr(), 0 if minimum is None else minimum.data_ptr()),
            *(0 if bias is None else bias.data_ptr(), out.data_ptr(), weight.shape[0]),
        )
        bits = 4 if weight.dtype == torch.uint8 else 8
        parts.append((*addresses, bits, scale.dtype == torch.bfloat16))
        outs.append(out)
    count = rows.numel() // max(1, inputs)
    _C.quantized_linears(rows.data_ptr(), parts, count, inputs, groups, torch.get_num_threads())
    return tuple(out.to(vectors.dtype) for out in outs)
