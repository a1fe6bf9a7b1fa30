"""Attention over codes, slow and obvious: look every key and value up, then attend densely.

Differentiable in the query and in the codebooks, so training may compose it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels._rotary import Rope, apply_rope
from astra_kernels.attention.reference import attention, compute_dtype


def look_up(codes: Tensor, codebook: Tensor, code_mask: Tensor | None = None) -> Tensor:
    """codes [B, N, C] -> the vectors they stand for, [B, Hkv, N, d]; zero at hidden tokens.

    Code r*C0 + h*S + s (own codes per KV head, C0 = Hkv*S) or r*C0 + s (shared, C0 = S) picks
    sub-vector s of KV head h in stage r; the stages are summed.
    """
    codebook = codebook if codebook.ndim == 5 else codebook.unsqueeze(0)
    stages, kv_heads, groups, _, _ = codebook.shape
    shared = codes.shape[2] == stages * groups
    per_stage = groups if shared else kv_heads * groups
    index = codes.long()
    if code_mask is not None:  # codes of hidden tokens may be anything
        index = index.masked_fill(~code_mask.unsqueeze(-1), 0)
    heads = []
    for head in range(kv_heads):
        first = 0 if shared else head * groups
        parts = []
        for group in range(groups):
            stage_rows = [
                codebook[stage, head, group][index[:, :, stage * per_stage + first + group]]
                for stage in range(stages)
            ]
            parts.append(torch.stack(stage_rows).sum(dim=0))
        heads.append(torch.cat(parts, dim=-1))
    vectors = torch.stack(heads, dim=1)
    if code_mask is not None:
        vectors = vectors.masked_fill(~code_mask[:, None, :, None], 0.0)
    return vectors


def look_up_keys_values(
    query: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    value_codes: Tensor | None,
    rope: Rope | None,
    code_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(query)
    key = look_up(codes, key_codebook.to(dtype), code_mask)
    value_codes = codes if value_codes is None else value_codes
    value = look_up(value_codes, value_codebook.to(dtype), code_mask)
    return (key if rope is None else apply_rope(key, rope)), value


def coded_attention(
    query: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    value_codes: Tensor | None = None,
    scale: float | None = None,
    rope: Rope | None = None,
    code_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    key, value = look_up_keys_values(
        query, codes, key_codebook, value_codebook, value_codes, rope, code_mask
    )
    return attention(
        query,
        key,
        value,
        key_mask=code_mask,
        scale=scale,
        attn_mask=attn_mask,
        softcap=softcap,
        sinks=sinks,
    )
