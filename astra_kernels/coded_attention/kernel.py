"""Attention over codes in Triton: looked up in the loop, counted, or expanded first.

Packed codes are read as they are, so a cache of codes stays packed in memory.
"""

from __future__ import annotations

from torch import Tensor

from astra_kernels._checks import CodedShape
from astra_kernels._rotary import Rope
from astra_kernels._triton.attention import FEW_ROWS, Scores, attend
from astra_kernels._triton.expand import expand
from astra_kernels._triton.launch import capability
from astra_kernels._triton.sources import Coded, Counted, Dense, State
from astra_kernels._triton.strategies import COUNTED, EXPANDED, choose
from astra_kernels.attention.kernel import attend_dense
from astra_kernels.codeword_attention.kernel import attend_counted
from astra_kernels.count_codes.kernel import count_codes


def coded_attention(
    query: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    value_codes: Tensor | None = None,
    scale: float | None = None,
    rope: Rope | None = None,
    code_mask: Tensor | None = None,
    code_bits: int | None = None,
    shape: CodedShape | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    strategy: str | None = None,
    library: bool = False,
) -> State:
    """``shape`` is needed where codes are packed; ``strategy`` overrides the choice; ``library``:
    what is dense may go to cuDNN."""
    coded = describe(
        codes, key_codebook, value_codebook, value_codes, rope, code_mask, code_bits, shape,
        attn_mask,
    )  # fmt: skip
    scores = Scores(scale, softcap, sinks)
    strategy = strategy or choose_strategy(query, coded, value_codes is None)
    if strategy == COUNTED:
        return attend_counted(query, scores, count(coded), library=library)
    if strategy == EXPANDED:
        return attend_dense(query, scores, look_up(query, coded), library=library)
    return attend(query, scores, coded=coded)


def describe(
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    value_codes: Tensor | None,
    rope: Rope | None,
    code_mask: Tensor | None,
    code_bits: int | None,
    shape: CodedShape | None,
    attn_mask: Tensor | None = None,
) -> Coded:
    """The coded side of a call as the launchers take it."""
    keys = key_codebook if key_codebook.ndim == 5 else key_codebook.unsqueeze(0)
    values = value_codebook if value_codebook.ndim == 5 else value_codebook.unsqueeze(0)
    value_codes = codes if value_codes is None else value_codes
    if shape is not None:
        tokens, key_count, value_count = shape.tokens, shape.key_codes, shape.value_codes
    else:
        tokens, key_count, value_count = codes.shape[1], codes.shape[2], value_codes.shape[2]
    shared = key_count == keys.shape[0] * keys.shape[2]
    value_shared = value_count == values.shape[0] * values.shape[2]
    return Coded(
        *(tokens, codes, keys, shared, value_codes, values, value_shared),
        bits=code_bits,
        rope=rope,
        mask=code_mask,
        attn_mask=attn_mask,
    )


def choose_strategy(query: Tensor, coded: Coded, same_codes: bool) -> str:
    stages, kv_heads, groups, codewords, _ = coded.key_table.shape
    rows = query.shape[2] * query.shape[1] // kv_heads
    return choose(
        capability(query.device),
        tokens=coded.tokens,
        codewords=codewords,
        rows=rows,
        few_rows=rows <= FEW_ROWS,
        collapses=(
            coded.rope is None and coded.attn_mask is None and same_codes and stages * groups == 1
        ),
    )


def count(coded: Coded) -> Counted:
    """Codewords and how often the visible tokens have them; one code a token and head."""
    kv_heads, codewords = coded.key_table.shape[1], coded.key_table.shape[3]
    counts = count_codes(
        coded.codes,
        codewords,
        code_bits=coded.bits,
        num_tokens=coded.tokens,
        codes_per_token=1 if coded.shared else kv_heads,
        code_mask=coded.mask,
    )
    return Counted(counts, coded.key_table[0], coded.value_table[0])


def look_up(query: Tensor, coded: Coded) -> Dense:
    """All keys and values, dense, in query's dtype."""
    batch = query.shape[0]
    key = expand(
        *(coded.codes, coded.key_table, batch, coded.tokens),
        shared=coded.shared,
        code_bits=coded.bits,
        dtype=query.dtype,
        rope=coded.rope,
        code_mask=coded.mask,
    )
    value = expand(
        *(coded.value_codes, coded.value_table, batch, coded.tokens),
        shared=coded.value_shared,
        code_bits=coded.bits,
        dtype=query.dtype,
        code_mask=coded.mask,
    )
    return Dense(key, value, mask=coded.mask, attn_mask=coded.attn_mask)
