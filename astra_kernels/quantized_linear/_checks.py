"""Rejections of bad input to ``quantized_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _checks as checks

OP = "quantized_linear"
VECTORS = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (torch.float32, torch.bfloat16)


def check_quantized_linear(
    vectors: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None
) -> None:
    checks.check_forward_only(OP, vectors=vectors, scale=scale, minimum=minimum, bias=bias)
    checks.check_dtype(OP, "vectors", vectors, VECTORS)
    checks.check_dtype(OP, "weight", weight, (torch.int8, torch.uint8))
    checks.check_ndim(OP, "weight", weight, "N, K")
    rows, inputs = weight.shape[0], weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    if vectors.ndim < 1 or vectors.shape[-1] != inputs:
        expected = f"[..., {inputs}] (K of weight)"
        checks.fail_value(OP, "vectors", expected, checks.shape_of(vectors))
    checks.check_dtype(OP, "scale", scale, SCALES)
    checks.check_ndim(OP, "scale", scale, "N, G")
    groups = scale.shape[1]
    fits = scale.shape[0] == rows and groups > 0 and inputs > 0 and inputs % groups == 0
    if not fits or (inputs // groups) % 2:
        expected = f"[{rows}, G] (N of weight), G groups of an even number of its {inputs} columns"
        checks.fail_value(OP, "scale", expected, checks.shape_of(scale))
    if (minimum is not None) != (weight.dtype == torch.uint8):
        expected = "given with weights of 4 bits, and with no others"
        got = "None" if minimum is None else f"one beside {weight.dtype}"
        checks.fail_value(OP, "minimum", expected, got)
    if minimum is not None:
        checks.check_dtype(OP, "minimum", minimum, (scale.dtype,))
        if minimum.shape != scale.shape:
            expected = f"of scale's shape {list(scale.shape)}"
            checks.fail_value(OP, "minimum", expected, checks.shape_of(minimum))
    if bias is not None:
        checks.check_dtype(OP, "bias", bias, (torch.float32,))
        if bias.shape != (rows,):
            checks.fail_value(OP, "bias", f"[{rows}] (N of weight)", checks.shape_of(bias))
    for name, tensor in (
        ("weight", weight),
        ("scale", scale),
        ("minimum", minimum),
        ("bias", bias),
    ):
        if tensor is not None:
            checks.check_device(OP, name, tensor, vectors.device)
