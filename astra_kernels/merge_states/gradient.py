"""The gradient of merging states: out = sum_s w_s out_s with the softmax w of their lse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    outs: Sequence[Tensor],
    lses: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Gradients to S outs [..., d], and to lses [S, ...]; 0 to states that have no say."""
    dtype = lses.dtype
    empty = lses == float("-inf")
    weights = torch.softmax(lses.masked_fill(empty.all(dim=0), 0.0), dim=0)
    weights = weights.masked_fill(empty, 0.0)
    grad_lses = torch.zeros_like(lses) if grad_lse is None else weights * grad_lse
    if grad_out is None:
        return [torch.zeros_like(part) for part in outs], grad_lses
    wide = grad_out.to(dtype)
    grad_outs = []
    for place, part in enumerate(outs):
        weight = weights[place]
        grad_outs.append((weight.unsqueeze(-1) * wide).to(part.dtype))
        lead = (part.to(dtype) - out).masked_fill(empty[place].unsqueeze(-1), 0.0)
        grad_lses[place] += weight * (wide * lead).sum(dim=-1)
    return grad_outs, grad_lses
