"""Look up, normalize, project on a CPU: one row gather a stage and one matmul."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lookup_linear(
    codes: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    estimate: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """Sums and norms are in fp32, the product in weight's dtype; all in fp64 if an input is."""
    given = (codebook, weight, bias, estimate)
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in given)
    dtype = torch.float64 if double else torch.float32
    hidden = _look_up(codes, codebook, dtype)
    if estimate is not None:
        hidden = hidden.add_(estimate).to(estimate.dtype)
    normed = _normalize(hidden.to(dtype), norm, eps)
    matmul = dtype if double else weight.dtype
    y = F.linear(normed.to(matmul), weight.to(matmul), None if bias is None else bias.to(matmul))
    return y.to(weight.dtype), None if estimate is None else hidden


def _look_up(codes: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor [..., C*w]."""
    stages, groups, codewords, width = (1, *codebook.shape)[-4:]
    first_rows = torch.arange(0, stages * groups * codewords, codewords, device="cpu")
    index = (codes + first_rows).reshape(-1, stages, groups)
    table = codebook.reshape(-1, width)
    hidden = table.index_select(0, index[:, 0].reshape(-1)).to(dtype)
    for stage in range(1, stages):
        hidden += table.index_select(0, index[:, stage].reshape(-1))
    return hidden.view(*codes.shape[:-1], groups * width)


def _normalize(x: Tensor, norm: str | None, eps: float) -> Tensor:
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return x if norm is None else F.layer_norm(x, x.shape[-1:], eps=eps)
