"""Attention over codewords and counts in Triton, or by cuDNN."""

from __future__ import annotations

from torch import Tensor

from astra_kernels._triton.attention import Scores, attend
from astra_kernels._triton.sources import Counted, State
from astra_kernels.attention import cudnn


def codeword_attention(
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    scale: float | None = None,
    library: bool = False,
) -> State:
    """``library``: cuDNN, too, where it is quicker."""
    counted = Counted(counts, key_codebook, value_codebook)
    return attend_counted(query, Scores(scale), counted, library=library)


def attend_counted(query: Tensor, scores: Scores, counted: Counted, *, library: bool) -> State:
    if library and scores.softcap is None and scores.sinks is None:
        state = cudnn.codeword_attention(query, counted, scores.scale)
        if state is not None:
            return state
    return attend(query, scores, counted=counted)
