"""Dense attention in Triton, the attention kernel over dense keys alone, or by cuDNN."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from astra_kernels._triton.attention import Scores, attend
from astra_kernels._triton.sources import Dense, State
from astra_kernels.attention import cudnn


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
    library: bool = False,
) -> State:
    """``library``: cuDNN, too, where it is quicker."""
    dense = Dense(key, value, is_causal, key_mask, attn_mask, window)
    return attend_dense(query, Scores(scale, softcap, sinks), dense, library=library)


def attend_dense(query: Tensor, scores: Scores, dense: Dense, *, library: bool) -> State:
    if library and scores.softcap is None and scores.sinks is None:
        state = cudnn.attention(query, dense, scores.scale)
        if state is not None:
            return state
    return attend(query, scores, dense=dense)
