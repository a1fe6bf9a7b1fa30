"""Attention over codes on a CPU: in C++ where it serves; or looked up, then torch's flash kernel.

Looking rows up costs little beside the attention itself (bench/ops.py), so without the C++ kernel
the codes are expanded to dense keys and values. Where equal codes have equal keys and there are
many tokens a codeword, the codes are counted instead and the tokens' number no longer matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels._rotary import Rope, apply_rope
from astra_kernels.attention import native as attention_native
from astra_kernels.attention.blocks import compute_dtype, is_coarse, merged, new_state
from astra_kernels.attention.cpu import attention, flash, with_sinks
from astra_kernels.coded_attention import native
from astra_kernels.codeword_attention.cpu import codewords
from astra_kernels.count_codes.cpu import count

# Tokens per codeword from which counting beats expanding, on codes drawn evenly, the worst case
# (bench/ops.py, case `coded_crossover`: 0.5 to 0.8, and 1.7 for single queries whose heads have
# codes of their own, as each head is then a small call).
COUNTING_TOKENS_PER_CODEWORD = 0.75
COUNTING_TOKENS_PER_CODEWORD_DECODING = 1.75
# The same beside the C++ kernel, which takes a third less than expanding (bench/native.py): 1.0 to
# 1.4, single queries with codes shared by the heads 0.9, with codes of their own 6.
COUNTING_BESIDE_NATIVE = 1.1
COUNTING_BESIDE_NATIVE_DECODING = 6.0
DECODING_ROWS = 16

# Numbers of looked-up keys that are there at a time, over all batch rows and KV heads.
LOOKED_UP = 2**20


def row_index(codes: Tensor, table: Tensor) -> Tensor:
    """codes [B, N, C] -> which rows of table [R, Hkv, S, K, d/S] they mean, [R, B*N*Hkv*S]."""
    stages, kv_heads, groups, codewords, _ = table.shape
    batch, tokens, codes_per_token = codes.shape
    shared = codes_per_token == stages * groups
    first_rows = torch.arange(0, stages * kv_heads * groups * codewords, codewords, device="cpu")
    index = codes.reshape(batch, tokens, stages, 1 if shared else kv_heads, groups)
    index = index + first_rows.view(stages, kv_heads, groups)
    return index.movedim(2, 0).reshape(stages, -1)


def gather(index: Tensor, table: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows of the table, summed over stages, as [B, Hkv, N, d], stored as [B, N, Hkv, d]."""
    stages, kv_heads, groups, _, width = table.shape
    rows = table.reshape(-1, width)
    vectors = rows.index_select(0, index[0]).to(dtype)
    for stage in range(1, stages):
        vectors += rows.index_select(0, index[stage])
    return vectors.view(*shape, kv_heads, groups * width).transpose(1, 2)


def _counting_from(query: Tensor, codes_per_token: int) -> float:
    serves = attention_native.serves(query.dtype)
    if query.shape[2] < DECODING_ROWS and codes_per_token > 1:
        return COUNTING_BESIDE_NATIVE_DECODING if serves else COUNTING_TOKENS_PER_CODEWORD_DECODING
    return COUNTING_BESIDE_NATIVE if serves else COUNTING_TOKENS_PER_CODEWORD


def _visible_only(
    query: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    value_codes: Tensor | None,
    scale: float | None,
    rope: Rope | None,
    code_mask: Tensor,
    attn_mask: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Each batch row over its visible tokens alone."""
    groups, _, width = value_codebook.shape[-3:]
    out, lse = new_state(query, groups * width)
    for row in range(query.shape[0]):
        index = code_mask[row].nonzero().squeeze(1)
        one = slice(row, row + 1)
        row_rope = None
        if rope is not None:
            cos, sin = (x if x.ndim == 2 else x[row % x.shape[0]] for x in rope)
            row_rope = (cos.index_select(0, index), sin.index_select(0, index))
        row_mask = attn_mask
        if row_mask is not None:
            row_mask = row_mask[one] if row_mask.ndim == 4 and row_mask.shape[0] > 1 else row_mask
            row_mask = row_mask if row_mask.shape[-1] == 1 else row_mask.index_select(-1, index)
        out[one], lse[one] = coded_attention(
            query[one],
            codes[one].index_select(1, index),
            key_codebook,
            value_codebook,
            value_codes=None if value_codes is None else value_codes[one].index_select(1, index),
            scale=scale,
            rope=row_rope,
            attn_mask=row_mask,
            softcap=softcap,
        )
    return out, lse


def collapses(
    query: Tensor,
    codes: tuple[int, int],
    table: Tensor,
    rope: Rope | None,
    value_codes: Tensor | None,
) -> bool:
    """Whether codes are counted: equal codes have equal keys, and there are enough of them.

    `codes`: the numbers of tokens and of a token's codes.
    """
    stages, groups = (table.shape[0] if table.ndim == 5 else 1), table.shape[-3]
    if rope is not None or value_codes is not None or stages * groups != 1:
        return False
    return codes[0] >= table.shape[-2] * _counting_from(query, codes[1])


def looks_up(
    query: Tensor,
    codes: tuple[int, int],
    table: Tensor,
    rope: Rope | None,
    value_codes: Tensor | None,
) -> bool:
    """Whether the C++ kernel is the fastest: it serves, and codes are not counted instead."""
    serves = attention_native.serves(query.dtype)
    return serves and not collapses(query, codes, table, rope, value_codes)


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
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    plain = attn_mask is None and softcap is None
    sizes = (codes.shape[1], codes.shape[2])
    if plain and looks_up(query, sizes, key_codebook, rope, value_codes):
        return native.coded_attention(
            *(query, codes, key_codebook, value_codebook),
            value_codes=value_codes,
            scale=scale,
            rope=rope,
            code_mask=code_mask,
            sinks=sinks,
        )
    if sinks is not None:
        options = {"value_codes": value_codes, "scale": scale, "rope": rope, "softcap": softcap}
        options |= {"code_mask": code_mask, "attn_mask": attn_mask}
        state = coded_attention(query, codes, key_codebook, value_codebook, **options)  # type: ignore[arg-type]
        return with_sinks(state, sinks)
    if code_mask is not None and not code_mask.all():
        return _visible_only(
            *(query, codes, key_codebook, value_codebook, value_codes, scale, rope, code_mask),
            *(attn_mask, softcap),
        )
    keys = key_codebook if key_codebook.ndim == 5 else key_codebook.unsqueeze(0)
    values = value_codebook if value_codebook.ndim == 5 else value_codebook.unsqueeze(0)
    if attn_mask is None and collapses(query, sizes, keys, rope, value_codes):
        counts = count(codes, keys.shape[3])
        return codewords(query, counts, keys[0], values[0], scale, softcap)
    size = max(256, LOOKED_UP // max(1, codes.shape[0] * keys.shape[1] * query.shape[3]))
    given = (codes, keys, values, value_codes, scale, rope, attn_mask, softcap)
    if size >= codes.shape[1]:
        return _by_lookup(query, *given, codes.shape[1])
    out, lse = _by_lookup(query.to(compute_dtype(query)), *given, size)
    if is_coarse(lse):
        # Such parts cannot be weighed by their lse.
        return _by_lookup(query, *given, codes.shape[1])
    return out.to(query.dtype), lse


def _by_lookup(
    query: Tensor,
    codes: Tensor,
    keys: Tensor,
    values: Tensor,
    value_codes: Tensor | None,
    scale: float | None,
    rope: Rope | None,
    attn_mask: Tensor | None,
    softcap: float | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Tokens' keys and values out of the tables, ``size`` tokens at a time."""
    batch, tokens, _ = codes.shape
    dtype = compute_dtype(query)

    def over(some: slice) -> tuple[Tensor, Tensor]:
        shape = (batch, some.stop - some.start)
        index = row_index(codes[:, some], keys)
        key = gather(index, keys, shape, dtype)
        if value_codes is not None:
            index = row_index(value_codes[:, some], values)
        value = gather(index, values, shape, dtype)
        if rope is not None:
            key = apply_rope(key, (rope[0][..., some, :], rope[1][..., some, :]))
        mask = attn_mask
        if mask is not None and mask.shape[-1] > 1:
            mask = mask[..., some]
        if mask is None and softcap is None:
            return flash(query, key, value, scale)
        return attention(query, key, value, scale=scale, attn_mask=mask, softcap=softcap)

    starts = range(0, max(1, tokens), max(1, size))
    return merged(over(slice(start, min(start + size, tokens))) for start in starts)
