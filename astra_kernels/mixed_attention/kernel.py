"""Mixed-Precision Attention in Triton: dense and coded keys in one launch, one softmax.

Where so many rows share the codes that looking them up once is quicker, the two halves are launches
of their own, and merged.
"""

from __future__ import annotations

from torch import Tensor

from astra_kernels._checks import CodedShape
from astra_kernels._rotary import Rope
from astra_kernels._triton.attention import Dense, State, attend
from astra_kernels._triton.strategies import COUNTED, EXPANDED
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
    rope_consecutive: bool = False,
    strategy: str | None = None,
) -> State:
    """``shape`` is needed where codes are packed; ``strategy`` overrides the choice."""
    dense = Dense(key, value, is_causal, key_mask)
    coded = describe(
        codes, key_codebook, value_codebook, value_codes, rope, code_mask, code_bits, shape,
        rope_consecutive,
    )  # fmt: skip
    if coded.tokens == 0:
        return attend(query, scale, dense=dense)
    strategy = strategy or choose_strategy(query, coded, value_codes is None)
    if strategy == COUNTED:
        return attend(query, scale, dense=dense, counted=count(coded))
    if strategy == EXPANDED:
        local = attend(query, scale, dense=dense)
        return merge_state(*local, *attend(query, scale, dense=look_up(query, coded)))
    return attend(query, scale, dense=dense, coded=coded)
