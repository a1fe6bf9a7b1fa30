"""Two partial softmaxes become one, slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(lse_a.dtype, lse_b.dtype)
    lse = torch.logaddexp(lse_a.to(dtype), lse_b.to(dtype))
    lse = lse.masked_fill(lse == float("inf"), float("nan"))
    out = torch.zeros(out_a.shape, dtype=dtype, device=out_a.device)
    for side, side_lse in ((out_a, lse_a), (out_b, lse_b)):
        empty = (side_lse == float("-inf")).unsqueeze(-1)  # a side without keys has no say
        weight = torch.exp(side_lse.to(dtype) - lse).unsqueeze(-1)
        out = out + torch.where(empty, 0.0, weight * side.to(dtype))
    return out.to(out_a.dtype), lse
