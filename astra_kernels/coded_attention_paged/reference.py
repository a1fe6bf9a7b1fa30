"""Attention over pages of codes, slow and obvious: unpack the pages of each sequence in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from astra_kernels.coded_attention import reference
from astra_kernels.pack.reference import unpack


def coded_attention_paged(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    code_bits: int,
    page_tokens: int = 64,
    rope: tuple[Tensor, Tensor] | None = None,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    stages = key_codebook.shape[0] if key_codebook.ndim == 5 else 1
    heads, groups = key_codebook.shape[-4:-2]
    own = stages * heads * groups
    whole = (page_tokens * own * code_bits + 7) // 8 == pages.shape[1]
    per_token = own if whole else stages * groups
    outs, lses = [], []
    for b, length in enumerate(lengths.tolist()):
        used = block_table[b, : -(-length // page_tokens)].tolist()
        parts = [
            unpack(pages[page], code_bits, page_tokens * per_token).view(page_tokens, per_token)
            for page in used
        ]
        codes = torch.cat(parts)[:length] if parts else pages.new_empty(0, per_token).int()
        angles = None if rope is None else (_rows(rope[0], b, length), _rows(rope[1], b, length))
        mask = None
        if attn_mask is not None:
            tokens = block_table.shape[1] * page_tokens
            mask = attn_mask.expand(*query.shape[:3], tokens)[b : b + 1, ..., :length]
        out, lse = reference.coded_attention(
            query[b : b + 1],
            codes[None],
            key_codebook,
            value_codebook,
            rope=angles,
            attn_mask=mask,
            **options,
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _rows(angles: Tensor, sequence: int, length: int) -> Tensor:
    """[length, d] of [N, d], [1, N, d] or [B, N, d]."""
    if angles.ndim == 3:
        angles = angles[sequence % len(angles)]
    return angles[:length]
