"""Two partial softmaxes become one on a CPU, in one pass over the outputs."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """out = a + w (b - a) with w = exp(lse_b) / (exp(lse_a) + exp(lse_b))."""
    lead = lse_b - lse_a
    lse = torch.logaddexp(lse_a, lse_b)
    # One reduction tells that no row is empty on either side (that would be inf or NaN).
    if not lead.sum().isfinite():
        empty = float("-inf")
        out_a = out_a.masked_fill((lse_a == empty).unsqueeze(-1), 0.0)
        out_b = out_b.masked_fill((lse_b == empty).unsqueeze(-1), 0.0)
        lead.nan_to_num_(nan=0.0, posinf=float("inf"), neginf=-float("inf"))  # empty on both sides
    weight = lead.sigmoid_().unsqueeze(-1)
    dtype = weight.dtype
    if out_a.dtype == dtype:
        return torch.lerp(out_a, out_b, weight, out=torch.empty_like(out_a)), lse
    return torch.lerp(out_a.to(dtype), out_b.to(dtype), weight).to(out_a.dtype), lse
