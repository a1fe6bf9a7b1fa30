"""Dense attention in Triton: the attention kernel over dense keys alone."""

from __future__ import annotations

from torch import Tensor

from astra_kernels._triton.attention import Dense, State, attend


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> State:
    return attend(query, scale, dense=Dense(key, value, is_causal, key_mask))
