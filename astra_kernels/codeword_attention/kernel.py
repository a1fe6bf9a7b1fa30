"""Attention over codewords and counts in Triton."""

from __future__ import annotations

from torch import Tensor

from astra_kernels._triton.attention import attend
from astra_kernels._triton.sources import Counted, State


def codeword_attention(
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    scale: float | None = None,
) -> State:
    return attend(query, scale, counted=Counted(counts, key_codebook, value_codebook))
