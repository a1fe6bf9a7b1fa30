"""The loops of the attention kernel, one for each kind of key, and what is done to their scores.

Keys pass by in tiles of KEYS. Each loop makes a tile's scores and values, and the online softmax
(m_i, l_i, acc) takes them in.

A score is scale q.k. Where that is all, it stays in units of the product (PLAIN), and the scale is
applied in the exponent; beside a bias of counts it is in base 2 (BASE_2). Softcap, masks per query
and sinks are defined on natural scores, and work on those (NATURAL).

Whole tiles and the ragged end are two loops (EDGE 0 and 1), so that only the end pays for masks.
With few rows time goes into reading, and with both dense and coded keys four loops would take long
to compile: one masked loop each does there (not WHOLE).
"""

import triton
import triton.language as tl

from astra_kernels._triton.blocks import (
    LN_2,
    NATURAL,
    PLAIN,
    capped,
    interleaved,
    load_rows,
    look_up,
    masked,
    online_softmax,
    rotated,
    split_of,
    visible,
)


@triton.jit
def scores_of(
    queries, keys, scale, softcap, UNITS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """queries [m, d] times keys [n, d], in UNITS."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if UNITS != PLAIN:
        scores *= scale
    if softcap is not None:
        scores = capped(scores, softcap, PRECISION)
    return scores


@triton.jit
def attend_to_dense(
    queries, key_rows, key_l, value_rows, value_l, key_mask, mask_offset, mask_rows, mask_l, seen,
    first_row, row_mask, position, num_queries_per_kv, num_queries, num_keys,
    left, right, scale, softcap, m_i, l_i, acc,
    CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    VALUE_HEAD: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """Takes this split's dense keys into the softmax.

    Query m stands at key L - M + m. It sees keys up to ``right`` (None: 0) after that one where
    CAUSAL, and from ``left`` before it on where that is given.
    """
    first, last = split_of(num_keys, KEYS)
    before = num_keys - num_queries + 1  # query m sees m + before keys; bottom-right aligned
    if right is not None:
        before += right
    if left is not None:
        start_of_window = num_keys - num_queries - left
        reached = first_row // num_queries_per_kv + start_of_window
        first = tl.maximum(first, reached // KEYS * KEYS)
    whole = first
    if CAUSAL:
        last = tl.minimum(last, (first_row + ROWS - 1) // num_queries_per_kv + before)
        if WHOLE:
            seen_by_all = tl.minimum(last, first_row // num_queries_per_kv + before)
            whole = first + tl.maximum(seen_by_all - first, 0) // KEYS * KEYS
    elif WHOLE and not KEY_MASK:
        whole = first + (last - first) // KEYS * KEYS
    for EDGE in tl.static_range(0 if WHOLE else 1, 2):
        for start in range(whole if EDGE else first, last if EDGE else whole, KEYS):
            token = start + tl.arange(0, KEYS)
            token_mask = visible(token < last, key_mask, mask_offset + token, KEY_MASK)
            token_mask = visible(token_mask, seen, token, seen is not None)
            if left is not None:
                token_mask = token_mask & (token >= reached)
            keys = load_rows(key_rows + token * key_l, token_mask, HEAD, BLOCK)
            scores = scores_of(queries, keys, scale, softcap, UNITS, PRECISION)
            if mask_rows is not None:
                # Tiles begin at multiples of their size, which the compiler does not see.
                column = tl.max_contiguous(tl.multiple_of(token, KEYS), KEYS)
                scores = masked(scores, mask_rows, column * mask_l, row_mask, token_mask, EDGE)
            if EDGE:
                score_mask = token_mask[None, :]
                if CAUSAL:
                    score_mask = score_mask & (token[None, :] < (position + before)[:, None])
                if left is not None:
                    in_window = token[None, :] >= (position + start_of_window)[:, None]
                    score_mask = score_mask & in_window
                scores = tl.where(score_mask, scores, -float("inf"))
            elif KEY_MASK:
                scores = tl.where(token_mask[None, :], scores, -float("inf"))
            values = load_rows(value_rows + token * value_l, token_mask, VALUE_HEAD, VALUE_BLOCK)
            m_i, l_i, acc = online_softmax(scores, values, m_i, l_i, acc, scale, UNITS, PRECISION)
    return m_i, l_i, acc


@triton.jit
def attend_to_codes(
    queries, key_codes, value_codes, key_table, value_table,
    cos, sin, code_mask, mask_offset, mask_rows, mask_l, seen, row_mask,
    head, num_kv_heads, num_tokens, codewords, value_codewords, scale, softcap, m_i, l_i, acc,
    ROTARY: tl.constexpr, CODE_MASK: tl.constexpr, BITS: tl.constexpr,
    SHARED: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr,
    VALUE_SHARED: tl.constexpr, VALUE_STAGES: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
    VALUE_HEAD: tl.constexpr, VALUE_BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    KEYS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Takes this split's coded keys into the softmax.

    queries: [ROWS, BLOCK]; where keys are ROTARY interleaved halves.
    """
    HALF: tl.constexpr = HEAD // 2
    first, last = split_of(num_tokens, KEYS)
    whole = first
    if WHOLE and not CODE_MASK:
        whole = first + (last - first) // KEYS * KEYS
    for EDGE in tl.static_range(0 if WHOLE else 1, 2):
        for start in range(whole if EDGE else first, last if EDGE else whole, KEYS):
            token = start + tl.arange(0, KEYS)
            token_mask = visible(token < last, code_mask, mask_offset + token, CODE_MASK)
            token_mask = visible(token_mask, seen, token, seen is not None)
            if not ROTARY:
                keys = look_up(
                    key_codes, key_table, token, token_mask, head, num_kv_heads, codewords,
                    0, HEAD, BLOCK, STAGES, GROUPS, HEAD // GROUPS, SHARED, BITS,
                ).to(DTYPE)  # fmt: skip
            else:
                key_1 = look_up(
                    key_codes, key_table, token, token_mask, head, num_kv_heads, codewords,
                    0, HALF, HALF_BLOCK, STAGES, GROUPS, HEAD // GROUPS, SHARED, BITS,
                )  # fmt: skip
                key_2 = look_up(
                    key_codes, key_table, token, token_mask, head, num_kv_heads, codewords,
                    HALF, HALF, HALF_BLOCK, STAGES, GROUPS, HEAD // GROUPS, SHARED, BITS,
                )  # fmt: skip
                key_cos = load_rows(cos + token * HEAD, token_mask, HALF, HALF_BLOCK)
                key_sin = load_rows(sin + token * HEAD, token_mask, HALF, HALF_BLOCK)
                keys = interleaved(*rotated(key_1, key_2, key_cos, key_sin, DTYPE))
            scores = scores_of(queries, keys, scale, softcap, UNITS, PRECISION)
            if mask_rows is not None:
                # Tiles begin at multiples of their size, which the compiler does not see.
                column = tl.max_contiguous(tl.multiple_of(token, KEYS), KEYS)
                scores = masked(scores, mask_rows, column * mask_l, row_mask, token_mask, EDGE)
            if EDGE:
                scores = tl.where(token_mask[None, :], scores, -float("inf"))
            values = look_up(
                value_codes, value_table, token, token_mask, head, num_kv_heads, value_codewords,
                0, VALUE_HEAD, VALUE_BLOCK, VALUE_STAGES, VALUE_GROUPS, VALUE_HEAD // VALUE_GROUPS,
                VALUE_SHARED, BITS,
            ).to(DTYPE)  # fmt: skip
            m_i, l_i, acc = online_softmax(scores, values, m_i, l_i, acc, scale, UNITS, PRECISION)
    return m_i, l_i, acc


@triton.jit
def attend_to_codewords(
    queries, key_rows, value_rows, bias, codewords, scale, softcap, m_i, l_i, acc,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, VALUE_HEAD: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Takes this split's codewords into the softmax: n equal keys add n exp2(s), bias log2(n).

    ``bias`` may also be the counts themselves, where a launch costs more than their logarithms.
    """
    first, last = split_of(codewords, KEYS)
    for start in range(first, last, KEYS):
        codeword = start + tl.arange(0, KEYS)
        if bias.dtype.element_ty == tl.int32:
            count = tl.load(bias + codeword, mask=codeword < last, other=0)
            log_count = tl.log2(tl.maximum(count, 1).to(tl.float32))
            log_count = tl.where(count > 0, log_count, -float("inf"))
        else:
            log_count = tl.load(bias + codeword, mask=codeword < last, other=-float("inf"))
        codeword_mask = log_count != -float("inf")
        keys = load_rows(key_rows + codeword * HEAD, codeword_mask, HEAD, BLOCK).to(DTYPE)
        scores = scores_of(queries, keys, scale, softcap, UNITS, PRECISION)
        if UNITS == NATURAL:
            log_count *= LN_2
        scores += log_count[None, :]
        values = load_rows(
            value_rows + codeword * VALUE_HEAD, codeword_mask, VALUE_HEAD, VALUE_BLOCK
        ).to(DTYPE)
        m_i, l_i, acc = online_softmax(scores, values, m_i, l_i, acc, scale, UNITS, PRECISION)
    return m_i, l_i, acc
