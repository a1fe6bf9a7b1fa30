"""A linear layer whose weights are integers of 8 or 4 bits, and whose inputs are rounded to 8."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels._checks import check_tensors

__all__ = ["quantized_linear"]


def quantized_linear(
    vectors: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    minimum: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """out[..., n] = Σ_k x̂[..., k] ŵ[n, k] + bias[n], x̂ and ŵ being what integers stand for.

    Args:
        vectors: x, [..., K], fp32, fp16 or bf16. Each of G groups of K/G consecutive values of a
            vector is rounded to 8 bits by itself: x̂ = q·max|x|/127 with q = round(127·x/max|x|), 0
            where max|x| is below 2^-119.
        weight: int8 [N, K], ŵ = scale·weight; or uint8 [N, K/2], two weights of 4 bits a byte, the
            even one in the low half, ŵ = scale·weight + minimum.
        scale: [N, G], fp32 or bf16, of the groups of weights.
        minimum: as `scale`, of the same dtype; with weights of 4 bits.
        bias: [N], fp32.
        impl: "auto", "reference" or "native"; an explicit choice never falls back.

    Returns:
        [..., N] in the dtype of `vectors`. Products are summed exactly within a group, groups in
        fp32. A vector's answer does not depend on the others beside it, but by the rounding of fp32
        on whether there are any. One with a NaN or an infinity gives NaN.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit.
        RuntimeError: an input requires grad, or ``impl`` cannot run here.

    Example:
        >>> weight, scale = torch.tensor([[127, 0], [64, -64]], dtype=torch.int8), torch.ones(2, 1)
        >>> ak.quantized_linear(torch.tensor([[1.27, 0.5]]), weight, scale / 127)
        tensor([[1.2700, 0.3880]])
    """
    optional = {"minimum": minimum, "bias": bias}
    check_tensors("quantized_linear", optional, vectors=vectors, weight=weight, scale=scale)
    out: Tensor = torch.ops.astra.quantized_linear(vectors, weight, scale, minimum, bias, impl)
    return out
