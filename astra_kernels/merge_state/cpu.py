"""Two partial softmaxes become one on a CPU, in one pass over the outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from astra_kernels import _C


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """out = a + w (b - a) with w = exp(lse_b) / (exp(lse_a) + exp(lse_b))."""
    given = out_a, lse_a, out_b, lse_b
    if all(t.dtype == torch.float32 and t.is_contiguous() for t in given):
        out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
        _C.merge_state(
            out_a.data_ptr(),
            lse_a.data_ptr(),
            out_b.data_ptr(),
            lse_b.data_ptr(),
            lse.numel(),
            out.shape[-1],
            out.data_ptr(),
            lse.data_ptr(),
            torch.get_num_threads(),
        )
        return out, lse
    lead = lse_b - lse_a
    lse = torch.logaddexp(lse_a, lse_b)
    # One reduction tells that no row is empty on either side (that would be inf or NaN).
    if not lead.sum().isfinite():
        empty_a, empty_b = lse_a == -math.inf, lse_b == -math.inf
        out_a = out_a.masked_fill(empty_a.unsqueeze(-1), 0.0)
        out_b = out_b.masked_fill(empty_b.unsqueeze(-1), 0.0)
        lead.masked_fill_(empty_a & empty_b, 0.0)
        infinite = (lse_a == math.inf) | (lse_b == math.inf)
        lead.masked_fill_(infinite, math.nan)
        lse.masked_fill_(infinite, math.nan)
    weight = lead.sigmoid_().unsqueeze(-1)
    dtype = weight.dtype
    if out_a.dtype == dtype:
        return torch.lerp(out_a, out_b, weight, out=torch.empty_like(out_a)), lse
    return torch.lerp(out_a.to(dtype), out_b.to(dtype), weight).to(out_a.dtype), lse
