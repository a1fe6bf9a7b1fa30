"""Dense attention on a CPU: the C++ kernel where it serves, else torch's flash kernel.

The flash kernel also gives the log-sum-exp. Five of its habits are worked around here. It divides
by zero on an empty key set. It reports lse 0 for a row that sees nothing, and out and lse 0 for one
whose scores are all NaN. It misreads tensors whose last axis is not contiguous. And it lets NaN
through from masked keys and values, so hidden keys are taken out instead of masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from astra_kernels.attention import native
from astra_kernels.attention.blocks import (
    compute_dtype,
    forward,
    is_coarse,
    merged,
    new_state,
    some_heads,
)
from astra_kernels.attention.visibility import Visibility, of_heads, visibility

# Rows of queries that share one flash call under a causal mask. The kernel skips keys in blocks of
# 512 only; cutting the rows leaves out most of the other half of the square (bench/ops.py, case
# `causal_rows`).
CAUSAL_ROWS = 64

# Numbers of a mask that are made the kernel's dtype at a time.
CONVERTED = 2**22

# Numbers of queries or of keys of some heads that are brought into another dtype or width at a
# time, unless that left threads idle; and of one head, where threads would be idle.
HEADS_CONVERTED = 2**19
MOST_CONVERTED = 2**20

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def empty_state(query: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention over no keys."""
    out, lse = new_state(query, width)
    return out.zero_(), lse.fill_(float("-inf"))


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    bias: Tensor | None = None,
    hides: bool = False,
) -> tuple[Tensor, Tensor]:
    """All keys visible, or a bias (0 or finite or -inf) broadcastable to [B, H, M, L]. ``hides``:
    keys and values that the bias hides may be NaN."""
    width = value.shape[3]
    if key.shape[2] == 0 or query.numel() == 0:
        return empty_state(query, width)
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        # Without AMX the half-precision kernel is slower than fp32, and far less exact.
        return _in_fp32(query, key, value, scale, bias, hides)
    if width != query.shape[3]:
        scale = query.shape[3] ** -0.5 if scale is None else scale
        query, key, value = _of_one_width(query, key, value)
    # The kernel takes any strides but that of the last axis, which it believes to be 1.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    out, lse = _flash(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
    if not lse.all():
        _mend(lse == 0, query, key, value, scale, bias, out, lse)
    # One sum, in the order of memory, tells that there is no NaN (or numbers that are as large).
    if hides and not (out if out.is_contiguous() else out.transpose(1, 2)).sum().isfinite():
        wrong = lse.isnan() | out.isnan().any(dim=3)
        _mend(wrong, query, key, value, scale, bias, out, lse)
    out = out if out.shape[3] == width else out[..., :width]
    return out, lse.contiguous()


def _in_fp32(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    bias: Tensor | None,
    hides: bool,
) -> tuple[Tensor, Tensor]:
    """``flash``, some rows and some keys at a time in fp32."""
    num_rows, num_keys = (
        max(256, MOST_CONVERTED * x.shape[2] // max(1, x.numel())) for x in (query, key)
    )
    out, lse = new_state(query, value.shape[3])
    for start in range(0, query.shape[2], num_rows):
        rows = slice(start, start + num_rows)
        wide = query[:, :, rows].float()
        own = None if bias is None else bias[..., rows, :]
        state = _over_keys(wide, key, value, scale, own, hides, num_keys)
        if num_keys < key.shape[2] and is_coarse(state[1]):
            # Such parts cannot be weighed by their lse.
            state = _over_keys(wide, key, value, scale, own, hides, key.shape[2])
        out[:, :, rows], lse[:, :, rows] = state
    return out, lse


def _over_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    bias: Tensor | None,
    hides: bool,
    num_keys: int,
) -> tuple[Tensor, Tensor]:
    """Queries in fp32 over keys that are made so, ``num_keys`` at a time."""

    def over(keys: slice) -> tuple[Tensor, Tensor]:
        k, v = key[:, :, keys].float(), value[:, :, keys].float()
        return flash(query, k, v, scale, None if bias is None else bias[..., keys], hides)

    return merged(over(slice(n, n + num_keys)) for n in range(0, key.shape[2], num_keys))


def _of_one_width(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Zeros behind the narrower of keys and values: the kernel takes one width."""
    width = max(query.shape[3], value.shape[3])
    return [
        x if x.shape[3] == width else torch.nn.functional.pad(x, (0, width - x.shape[3]))
        for x in (query, key, value)
    ]


def _mend(
    wrong: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Rows in doubt, bool [B, H, M]: computed anew where scores are NaN or all -inf."""
    group = query.shape[1] // key.shape[1]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    for batch, head in wrong.any(dim=2).nonzero().tolist():
        keys, values = key[batch, head // group], value[batch, head // group]
        for rows in wrong[batch, head].nonzero().squeeze(1).split(CONVERTED // len(keys) + 1):
            place = (batch, head, rows)
            scores, seen = query[place] @ keys.mT * scale, values
            if bias is not None:
                own = bias.expand(*query.shape[:3], -1)[place]
                hidden = own == float("-inf")
                scores = (scores + own).masked_fill(hidden, float("-inf"))
                seen = seen.masked_fill(hidden.all(dim=0).unsqueeze(1), 0.0)
            exact = scores.logsumexp(dim=1)
            exact = exact.masked_fill(exact == float("inf"), float("nan"))
            empty = (exact == float("-inf")).unsqueeze(1)
            weights = scores.masked_fill(empty, 0.0).softmax(dim=1).masked_fill(empty, 0.0)
            change = ~exact.isfinite() | lse[place].isnan() | out[place].isnan().any(dim=1)
            lse[place] = torch.where(change, exact.to(lse.dtype), lse[place])
            mended = (weights @ seen).to(out.dtype)
            out[place] = torch.where(change.unsqueeze(1), mended, out[place])


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
    stairs = torch.zeros(block, columns + block, dtype=compute_dtype(query), device="cpu")
    stairs[:, columns:].fill_(float("-inf")).triu_(1)
    out, lse = new_state(query, value.shape[3])
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
    out, lse = new_state(query, value.shape[3])
    for row in range(query.shape[0]):
        index = key_mask[row].nonzero().squeeze(1)
        one = slice(row, row + 1)
        bias = None
        if is_causal:
            place = torch.arange(tokens - rows, tokens, device="cpu").unsqueeze(1)
            bias = torch.zeros(rows, len(index), dtype=compute_dtype(query), device="cpu")
            bias.masked_fill_(index > place, float("-inf"))
        key_row, value_row = (x[one].index_select(2, index) for x in (key, value))
        out[one], lse[one] = flash(query[one], key_row, value_row, scale, bias)
        if is_causal and len(index) > 0:
            lse[one].masked_fill_((place < index[0]).squeeze(1), float("-inf"))
    return out, lse


def _by_rows(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, see: Visibility
) -> tuple[Tensor, Tensor]:
    """A flash call for some of the rows, over the keys that they can see."""
    dtype = compute_dtype(query)
    if see.key_mask is not None:
        hidden = ~see.key_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    block = _rows_at_once(see)
    if block >= see.rows:
        low, high = see.span(0, see.rows)
        bias = see.bias(0, see.rows, low, high, dtype, query.device)
        if bias is not None:
            bias = bias.expand(*bias.shape[:-2], see.rows, high - low)
        return flash(query, key[:, :, low:high], value[:, :, low:high], scale, bias, hides=True)
    out, lse = new_state(query, value.shape[3])
    for start in range(0, see.rows, block):
        stop = min(start + block, see.rows)
        low, high = see.span(start, stop)
        bias = see.bias(start, stop, low, high, dtype, query.device)
        if bias is not None:
            bias = bias.expand(*bias.shape[:-2], stop - start, high - low)
        rows = query[:, :, start:stop]
        part = flash(rows, key[:, :, low:high], value[:, :, low:high], scale, bias, hides=True)
        out[:, :, start:stop], lse[:, :, start:stop] = part
    return out, lse


def _rows_at_once(see: Visibility) -> int:
    """All, unless a band leaves out keys or a mask has to be converted."""
    rows = max(1, see.rows)
    if see.banded:
        return min(CAUSAL_ROWS, rows)
    mask = see.attn_mask
    if mask is None or mask.shape[2] == 1 or mask.dtype in (torch.float32, torch.float64):
        return rows
    return max(1, min(rows, CONVERTED * rows // max(1, mask.numel())))


def with_sinks(state: tuple[Tensor, Tensor], sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A score for each head whose value is zero joins the softmax."""
    out, lse = state
    sink = sinks.to(lse.dtype)[:, None]
    both = torch.logaddexp(lse, sink)
    weight = (lse - both.masked_fill(both == float("-inf"), 0.0)).exp_().unsqueeze(3)
    return (out * weight).to(out.dtype), both


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
    if attn_mask is None and window is None and softcap is None and native.serves(query.dtype):
        return native.attention(
            query, key, value, is_causal=is_causal, key_mask=key_mask, scale=scale, sinks=sinks
        )
    if key_mask is not None and key_mask.all():
        key_mask = None
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
    }
    if _is_ready(query, value, key_mask):
        state = _whole(query, key, value, key_mask=key_mask, attn_mask=attn_mask, **options)
        return state if sinks is None else with_sinks(state, sinks)
    out, lse = new_state(query, value.shape[3])
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    for batch, heads, kv_heads in some_heads(query, key, HEADS_CONVERTED):
        place, own = (batch, heads), (batch, kv_heads)
        q, k, v = query[place], key[own], value[own]
        if max(q.numel(), k.numel(), v.numel()) <= MOST_CONVERTED:
            q, k, v = q.to(lse.dtype), k.to(lse.dtype), v.to(lse.dtype)
        state = _whole(
            *(q, k, v),
            key_mask=None if key_mask is None else key_mask[batch],
            attn_mask=None if attn_mask is None else of_heads(attn_mask, batch, heads),
            **options,
        )
        out[place], lse[place] = state if sinks is None else with_sinks(state, sinks[heads])
    return out, lse


def _is_ready(query: Tensor, value: Tensor, key_mask: Tensor | None) -> bool:
    """Whether torch's flash kernel takes the tensors of a call as they are."""
    one_width = query.shape[3] == value.shape[3]
    return query.dtype == compute_dtype(query) and one_width and key_mask is None


def _whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    key_mask: Tensor | None,
    scale: float | None,
    attn_mask: Tensor | None,
    window: Sequence[int] | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    more_queries = is_causal and query.shape[2] > key.shape[2]
    if attn_mask is None and window is None and softcap is None and not more_queries:
        if key_mask is not None:
            state = _visible_only(query, key, value, is_causal, key_mask, scale)
        elif is_causal:
            state = _causal(query, key, value, scale)
        else:
            state = flash(query, key, value, scale)
    else:
        see = visibility(query, key.shape[2], is_causal, key_mask, attn_mask, window)
        state = _seen(query, key, value, scale, softcap, see)
    return state


def _seen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    softcap: float | None,
    see: Visibility,
) -> tuple[Tensor, Tensor]:
    if key.shape[2] == 0 or query.numel() == 0:
        return empty_state(query, value.shape[3])
    if softcap is not None:
        scale = query.shape[3] ** -0.5 if scale is None else scale
        out, lse = forward(query, key, value, scale, softcap, see)
        return out.to(query.dtype), lse
    if see.open:
        return flash(query, key, value, scale)
    if see.causal and see.rows <= see.tokens:
        return _causal(query, key, value, scale)
    return _by_rows(query, key, value, scale, see)
