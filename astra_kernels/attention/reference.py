"""Dense attention, slow and obvious: the definition that every faster path is tested against.

Differentiable, so training may compose it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(query: Tensor) -> torch.dtype:
    """Accumulation is fp32, or fp64 for fp64 queries."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v and its log-sum-exp; a bias of -inf hides a key.

    query [B, H, M, d], key and value [B, Hkv, L, d], bias broadcastable to [B, H, M, L].
    """
    dtype = compute_dtype(query)
    group = query.shape[1] // key.shape[1]
    key = key.to(dtype).repeat_interleave(group, dim=1)
    value = value.to(dtype).repeat_interleave(group, dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    scores = torch.einsum("bhmd,bhld->bhml", query.to(dtype), key) * scale
    hidden = (bias == float("-inf")).expand_as(scores)
    scores = (scores + bias).masked_fill(hidden, float("-inf"))  # NaN scores are hidden as well
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees nothing has lse -inf; shifting it by 0 gives weights 0 instead of NaN.
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = torch.exp(scores - shift.unsqueeze(-1))
    # 0 * NaN is NaN: values that no query of their head sees are cleared, not only weighted by 0.
    unseen = hidden.all(dim=2).unsqueeze(-1)
    out = torch.einsum("bhml,bhld->bhmd", weights, value.masked_fill(unseen, 0.0))
    return out.to(query.dtype), lse


def visibility_bias(query: Tensor, tokens: int, is_causal: bool, key_mask: Tensor | None) -> Tensor:
    """0 where query row m sees key l, -inf elsewhere, [B or 1, 1, M, L]."""
    rows = query.shape[2]
    visible = torch.ones(1, 1, rows, tokens, dtype=torch.bool, device=query.device)
    if is_causal:  # bottom-right: the last query sees the last key
        visible = visible.tril(diagonal=tokens - rows)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    bias = torch.zeros((), dtype=compute_dtype(query), device=query.device)
    return bias.masked_fill(~visible, float("-inf"))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    bias = visibility_bias(query, key.shape[2], is_causal, key_mask)
    return attend(query, key, value, bias, scale)
