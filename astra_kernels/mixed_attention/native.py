"""Mixed-precision attention on a CPU in C++: dense keys, then coded ones, in one softmax."""

from __future__ import annotations

from torch import Tensor

from astra_kernels import _C
from astra_kernels._checks import CodedShape
from astra_kernels._rotary import Rope
from astra_kernels.attention.native import Dense, prepare
from astra_kernels.coded_attention.native import Coded


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
    sinks: Tensor | None = None,
    code_bits: int | None = None,
    shape: CodedShape | None = None,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """`shape` is needed where codes are packed."""
    op = "mixed_attention"
    call = prepare(op, query, key.shape[1], value.shape[3], scale, sinks)
    dense = Dense(key, value, is_causal, key_mask)
    coded = Coded(
        codes, key_codebook, value_codebook, value_codes, rope, code_mask, code_bits, shape
    )
    found = _C.mixed_attention(
        call.shape, call.query, dense.keys, coded.keys, *call.rest, isa, *call.storage
    )
    coded.refuse(op, found)
    return call.state(query.dtype)
