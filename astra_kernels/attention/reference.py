"""Dense attention, slow and obvious: the definition that every faster path is tested against.

Differentiable, so training may compose it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_dtype(query: Tensor) -> torch.dtype:
    """Accumulation is fp32, or fp64 for fp64 queries."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(cap(scale * q k^T) + bias) v and its log-sum-exp; a bias of -inf hides a key.

    query [B, H, M, d], key [B, Hkv, L, d], value [B, Hkv, L, d_v], bias broadcastable to
    [B, H, M, L]; cap(s) = softcap * tanh(s / softcap). A sink [H] is one more score, of a key
    whose value is zero.
    """
    dtype = compute_dtype(query)
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    hidden = (bias == float("-inf")).expand(*query.shape[:3], key.shape[2])
    # 0 * NaN is NaN: what no query of its head sees is cleared, not only weighted by 0.
    unseen = hidden.all(dim=2).unsqueeze(-1)
    key = key.to(dtype).repeat_interleave(group, dim=1).masked_fill(unseen, 0.0)
    value = value.to(dtype).repeat_interleave(group, dim=1).masked_fill(unseen, 0.0)

    scores = torch.einsum("bhmd,bhld->bhml", query.to(dtype), key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).masked_fill(hidden, float("-inf"))  # NaN scores are hidden as well
    if sinks is not None:
        sink = sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees nothing has weights 0, not NaN. Others are divided by their sum, because lse
    # is too coarse for that where scores are near finfo.min.
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    weights = weights[..., : key.shape[2]]
    out = torch.einsum("bhml,bhld->bhmd", weights, value)
    return out.to(query.dtype), lse


def visibility_bias(
    query: Tensor,
    tokens: int,
    is_causal: bool,
    key_mask: Tensor | None,
    attn_mask: Tensor | None = None,
    window: Sequence[int] | None = None,
) -> Tensor:
    """A float mask, or 0, where query row m sees key l, -inf elsewhere, [B or 1, H or 1, M, L]."""
    rows = query.shape[2]
    left, right = (-1, -1) if window is None else window
    key_place = torch.arange(tokens, device=query.device)
    # Bottom-right: the last query stands at the last key.
    place = torch.arange(tokens - rows, tokens, device=query.device).unsqueeze(1)
    visible = torch.ones(rows, tokens, dtype=torch.bool, device=query.device)
    if is_causal:
        visible = visible & (key_place <= place)
    if right >= 0:
        visible = visible & (key_place <= place + right)
    if left >= 0:
        visible = visible & (key_place >= place - left)
    visible = visible[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    bias = torch.zeros((), dtype=compute_dtype(query), device=query.device)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        bias = attn_mask.to(bias.dtype)
    return torch.where(visible, bias, float("-inf"))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    bias = visibility_bias(query, key.shape[2], is_causal, key_mask, attn_mask, window)
    return attend(query, key, value, bias, scale, softcap, sinks)
