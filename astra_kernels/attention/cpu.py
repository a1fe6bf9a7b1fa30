"""Dense attention on a CPU: torch's flash kernel, which also gives the log-sum-exp.

Five of its habits are worked around here. It divides by zero on an empty key set. It reports lse 0
for a row that sees nothing, and out and lse 0 for one whose scores are all NaN. It misreads tensors
whose last axis is not contiguous. And it lets NaN through from masked keys and values, so hidden
keys are taken out instead of masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of queries that share one flash call under a causal mask. The kernel skips keys in blocks of
# 512 only; cutting the rows leaves out most of the other half of the square (bench/ops.py, case
# `causal_rows`).
CAUSAL_ROWS = 64

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def compute_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def new_state(query: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialized out and lse; out [B, H, M, d] is stored as [B, M, H, d], the layout that the
    flash kernel writes and that models want next."""
    batch, heads, rows, dim = query.shape
    out = query.new_empty((batch, rows, heads, dim)).transpose(1, 2)
    return out, query.new_empty((batch, heads, rows), dtype=compute_dtype(query))


def empty_state(query: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over no keys."""
    out, lse = new_state(query)
    return out.zero_(), lse.fill_(float("-inf"))


def flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All keys visible, or a bias (0 or finite or -inf) broadcastable to [B, H, M, L]."""
    if key.shape[2] == 0 or query.numel() == 0:
        return empty_state(query)
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        # Without AMX the half-precision kernel is slower than fp32, and far less exact.
        query, key, value = query.float(), key.float(), value.float()
    # The kernel takes any strides but that of the last axis, which it believes to be 1.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    out, lse = _flash(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
    if not lse.all():
        _mend_zeros(query, key, scale, bias, out, lse)
    return out.to(dtype), lse.contiguous()


def _mend_zeros(
    query: Tensor, key: Tensor, scale: float | None, bias: Tensor | None, out: Tensor, lse: Tensor
) -> None:
    """Rows of lse 0: those whose scores are all -inf or NaN get what is due, others keep it."""
    group = query.shape[1] // key.shape[1]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    for batch, head in (lse == 0).any(dim=2).nonzero().tolist():
        rows = (lse[batch, head] == 0).nonzero().squeeze(1)
        scores = query[batch, head, rows] @ key[batch, head // group].mT * scale
        if bias is not None:
            own = bias.expand(*query.shape[:3], -1)[batch, head, rows]
            scores = (scores + own).masked_fill(own == float("-inf"), float("-inf"))
        exact = scores.logsumexp(dim=1)
        wrong = ~exact.isfinite()
        exact = exact.masked_fill(exact == float("inf"), float("nan"))
        lse[batch, head, rows[wrong]] = exact[wrong].to(lse.dtype)
        empty = exact == float("-inf")
        out[batch, head, rows[wrong]] = torch.where(empty, 0.0, exact)[wrong, None].to(out.dtype)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Bottom-right aligned: row m of M sees the first L - M + m + 1 keys."""
    rows, tokens = query.shape[2], key.shape[2]
    if rows <= 1:
        return flash(query, key, value, scale)
    block = min(CAUSAL_ROWS, rows)
    last = (rows - 1) // block * block
    # One staircase serves all blocks: open columns, then a triangle. A block that starts at an
    # earlier row uses the same triangle with fewer open columns to its left.
    columns = tokens - rows + last
    stairs = torch.zeros(block, columns + block, dtype=compute_dtype(query))
    stairs[:, columns:].fill_(float("-inf")).triu_(1)
    out, lse = new_state(query)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        seen = tokens - rows + stop
        bias = stairs[: stop - start, last - start : last - start + seen]
        part = flash(query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], scale, bias)
        out[:, :, start:stop], lse[:, :, start:stop] = part
    return out, lse


def _visible_only(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_mask: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Each batch row over its visible keys alone."""
    rows, tokens = query.shape[2], key.shape[2]
    out, lse = new_state(query)
    for row in range(query.shape[0]):
        index = key_mask[row].nonzero().squeeze(1)
        one = slice(row, row + 1)
        bias = None
        if is_causal:
            place = torch.arange(tokens - rows, tokens).unsqueeze(1)
            bias = torch.zeros(rows, len(index), dtype=compute_dtype(query))
            bias.masked_fill_(index > place, float("-inf"))
        key_row, value_row = (x[one].index_select(2, index) for x in (key, value))
        out[one], lse[one] = flash(query[one], key_row, value_row, scale, bias)
        if is_causal and len(index) > 0:
            lse[one].masked_fill_((place < index[0]).squeeze(1), float("-inf"))
    return out, lse


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    if key_mask is not None and not key_mask.all():
        return _visible_only(query, key, value, is_causal, key_mask, scale)
    if is_causal:
        return _causal(query, key, value, scale)
    return flash(query, key, value, scale)
