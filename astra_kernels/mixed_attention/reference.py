"""Mixed-precision attention, slow and obvious: dense and coded keys side by side, one softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from astra_kernels._rotary import Rope
from astra_kernels.attention.reference import attend, visibility_bias
from astra_kernels.coded_attention.reference import look_up_keys_values


def mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    value_codes: Tensor | None = None,
    rope: Rope | None = None,
    code_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    window: Sequence[int] | None = None,
    code_attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    coded_key, coded_value = look_up_keys_values(
        query, codes, key_codebook, value_codebook, value_codes, rope, code_mask
    )
    local = visibility_bias(query, key.shape[2], is_causal, key_mask, attn_mask, window)
    remote = visibility_bias(query, coded_key.shape[2], False, code_mask, code_attn_mask)
    bias = torch.cat([part.expand(*query.shape[:3], -1) for part in (local, remote)], dim=3)
    dtype = coded_key.dtype
    return attend(
        query,
        torch.cat([key.to(dtype), coded_key], dim=2),
        torch.cat([value.to(dtype), coded_value], dim=2),
        bias,
        scale,
        softcap,
        sinks,
    )
