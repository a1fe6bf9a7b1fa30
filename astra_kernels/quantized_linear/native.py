"""Linear layers of integer weights on a CPU in C++; the weights are read where they lie."""

from __future__ import annotations

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
