"""Attention over codewords with their counts, slow and obvious."""

from __future__ import annotations

from torch import Tensor

from astra_kernels.attention.reference import attend, compute_dtype


def codeword_attention(
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """c equal keys add up to c * exp(score) = exp(score + ln c)."""
    dtype = compute_dtype(query)
    batch, kv_heads = query.shape[0], key_codebook.shape[0]
    key = key_codebook[:, 0].to(dtype).expand(batch, -1, -1, -1)
    value = value_codebook[:, 0].to(dtype).expand(batch, -1, -1, -1)
    log_counts = counts.to(dtype).log().expand(-1, kv_heads, -1)
    bias = log_counts.repeat_interleave(query.shape[1] // kv_heads, dim=1).unsqueeze(2)
    return attend(query, key, value, bias, scale)
