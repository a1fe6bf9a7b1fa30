"""Dense attention in Triton: the attention kernel over dense keys alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from astra_kernels._triton.attention import Scores, attend
from astra_kernels._triton.sources import Dense, State


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
) -> State:
    dense = Dense(key, value, is_causal, key_mask, attn_mask, window)
    return attend(query, Scores(scale, softcap, sinks), dense=dense)
