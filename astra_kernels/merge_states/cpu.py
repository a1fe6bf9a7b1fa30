"""Any number of partial softmaxes become one on a CPU: weights, then one weighted sum."""

from __future__ import annotations

import math

from torch import Tensor


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    lse = lses.logsumexp(dim=0)
    if not lse.isfinite().all():
        lse.masked_fill_((lses == math.inf).any(dim=0), math.nan)
    # Rows that nothing was seen for are shifted by 0, and weigh 0.
    weights = (lses - lse.masked_fill(lse == -math.inf, 0.0)).exp_()
    empty = lses == -math.inf
    out = lse.new_zeros(outs.shape[1:])
    for part, weight, unseen in zip(outs, weights, empty, strict=True):
        part = part.to(out.dtype)
        if unseen.any():
            part = part.masked_fill(unseen.unsqueeze(-1), 0.0)
        out.addcmul_(part, weight.unsqueeze(-1))
    return out.to(outs.dtype), lse
