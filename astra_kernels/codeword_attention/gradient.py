"""The gradient of attention over codewords with counts, to the query and the tables."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels.attention.blocks import Softmax, compute_dtype, zeros_like
from astra_kernels.attention.gradient import Gradients, of_keys, softmax_of
from astra_kernels.attention.visibility import visibility


def of_codewords(
    softmax: Softmax, counts: Tensor, key_codebook: Tensor, value_codebook: Tensor, fast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to the query and to the tables [Hkv, 1, K, d], in the dtype of accumulation; of
    one batch row at a time, and one KV head where heads have counts of their own."""
    dtype = compute_dtype(softmax.query)
    grad_query = zeros_like(softmax.query, dtype)
    grad_keys, grad_values = (
        torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        for x in (key_codebook, value_codebook)
    )
    batch, heads, _ = counts.shape
    group = softmax.query.shape[1] // heads
    kv_group = key_codebook.shape[0] // heads
    for row in range(batch):
        for head in range(heads):
            present = counts[row, head].nonzero().squeeze(1)
            bias = counts[row, head].index_select(0, present).to(dtype).log_()
            kv = slice(head * kv_group, (head + 1) * kv_group)
            key, value = (
                table[kv, 0].index_select(1, present).unsqueeze(0).to(dtype)
                for table in (key_codebook, value_codebook)
            )
            query_heads = slice(head * group, (head + 1) * group)
            part = softmax.part(slice(row, row + 1), query_heads)
            see = visibility(part.query, len(present), attn_mask=bias)
            grads = of_keys(part, key, value, see, None, fast)
            grad_query[row : row + 1, query_heads] = grads[0]
            grad_keys[kv, 0].index_add_(1, present, grads[1][0])
            grad_values[kv, 0].index_add_(1, present, grads[2][0])
    return grad_query, grad_keys, grad_values


def codeword_attention(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    scale: float | None = None,
    wanted: frozenset[str],
    fast: bool = True,
) -> Gradients:
    """Gradients by the arguments' names."""
    softmax = softmax_of(query, out, lse, grad_out, grad_lse, scale, None)
    grads = of_codewords(softmax, counts, key_codebook, value_codebook, fast)
    return dict(zip(("query", "key_codebook", "value_codebook"), grads, strict=True))
