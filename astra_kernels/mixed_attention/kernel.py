"""Mixed-Precision Attention in Triton: dense and coded keys in one launch, one softmax.

Where so many rows share the codes that looking them up once is quicker, the two halves are launches
of their own, and merged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from astra_kernels._checks import CodedShape
from astra_kernels._rotary import Rope
from astra_kernels._triton.attention import Scores, attend
from astra_kernels._triton.sources import Dense, State
from astra_kernels._triton.strategies import COUNTED, EXPANDED
from astra_kernels.attention.kernel import attend_dense
from astra_kernels.coded_attention.kernel import choose_strategy, count, describe, look_up
from astra_kernels.merge_state.kernel import merge_state


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
    code_bits: int | None = None,
    shape: CodedShape | None = None,
    attn_mask: Tensor | None = None,
    window: Sequence[int] | None = None,
    code_attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    strategy: str | None = None,
    library: bool = False,
) -> State:
    """``shape`` is needed where codes are packed; ``strategy`` overrides the choice; ``library``:
    what is dense may go to cuDNN."""
    dense = Dense(key, value, is_causal, key_mask, attn_mask, window)
    scores = Scores(scale, softcap, sinks)
    coded = describe(
        codes, key_codebook, value_codebook, value_codes, rope, code_mask, code_bits, shape,
        code_attn_mask,
    )  # fmt: skip
    if coded.tokens == 0:
        return attend_dense(query, scores, dense, library=library)
    strategy = strategy or choose_strategy(query, coded, value_codes is None)
    if strategy == COUNTED:
        return attend(query, scores, dense=dense, counted=count(coded))
    if strategy == EXPANDED and not (_adds(attn_mask) and _adds(code_attn_mask)):
        local = attend_dense(query, scores, dense, library=library)
        far = attend_dense(
            query, scores._replace(sinks=None), look_up(query, coded), library=library
        )
        return merge_state(*local, *far)
    return attend(query, scores, dense=dense, coded=coded)


def _adds(mask: Tensor | None) -> bool:
    """Whether a mask may hold numbers beside which the logarithm of a sum is lost in lse."""
    return mask is not None and mask.dtype != torch.bool
