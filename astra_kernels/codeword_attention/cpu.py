"""Attention over codewords and counts on a CPU: torch's flash kernel, ln(count) as its bias."""

from __future__ import annotations

from torch import Tensor

from astra_kernels.attention.blocks import compute_dtype, new_state
from astra_kernels.attention.cpu import attention, flash


def codewords(
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    scale: float | None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One flash call for each batch row, and for each KV head where heads have counts of their own,
    over the codewords that occur: what does not occur costs nothing and cannot leak."""
    batch, heads, _ = counts.shape
    group = query.shape[1] // heads
    kv_group = key_codebook.shape[0] // heads
    dtype = compute_dtype(query)
    out, lse = new_state(query, value_codebook.shape[3])
    for row in range(batch):
        for head in range(heads):
            present = counts[row, head].nonzero().squeeze(1)
            bias = counts[row, head].index_select(0, present).to(dtype).log_().unsqueeze(0)
            kv = slice(head * kv_group, (head + 1) * kv_group)
            key, value = (
                table[kv, 0].index_select(1, present).unsqueeze(0)
                for table in (key_codebook, value_codebook)
            )
            part = (slice(row, row + 1), slice(head * group, (head + 1) * group))
            rows = query[part]
            if softcap is not None:
                key, value, rows = key.to(dtype), value.to(dtype), rows.to(dtype)
                bias = bias.expand(1, -1)
                out[part], lse[part] = attention(
                    rows, key, value, scale=scale, attn_mask=bias, softcap=softcap
                )
                continue
            if key.dtype != query.dtype:
                key = key.to(dtype)
            value = value if value.dtype == query.dtype else value.to(dtype)
            bias = bias.expand(query.shape[2], -1)
            out[part], lse[part] = flash(rows, key, value, scale, bias)
    return out, lse


def codeword_attention(
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    return codewords(query, counts, key_codebook, value_codebook, scale)
