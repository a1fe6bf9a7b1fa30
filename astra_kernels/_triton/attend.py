"""One attention kernel for every kind of key: dense, coded, and codewords with counts.

A program owns a tile of queries of one KV head and one split of the keys. The query heads of a KV
head are rows of the tile, row = m * G + g, so that they share every lookup. Keys pass by in tiles:
the dense ones first, then those known by codes, or the codewords with log2(count) where equal codes
have equal keys. One online softmax takes in all of them. With several splits (for few queries) each
writes its partial softmax, and ``combine`` makes one out of them.

Rotary positions rotate looked-up keys in halves, score = q1.(k1 c - k2 s) + q2.(k2 c + k1 s): no
row is read twice, which loading its rotated half again would do, and angle tables are read by half.
The rotated halves are interleaved, in queries and keys alike, so that one product takes both.

Few queries spend their time on reading, and angles are a third of it. Where positions are
consecutive, the angle of a tile's j-th token is that of its first one and j steps: queries are
rotated back by the first, once a tile, and keys by the steps, the same in every tile, which stay in
registers. Then one row of angles is read a tile.

Whole tiles and the ragged end are two loops (EDGE 0 and 1), so that only the end pays for masks.
With few rows time goes into reading, and with both dense and coded keys four loops would take long
to compile: one masked loop each does there (not WHOLE).
"""

import triton
import triton.language as tl

from astra_kernels._triton.blocks import (
    interleaved,
    load_rows,
    look_up,
    online_softmax,
    rotated,
    split_of,
    visible,
)

# What REMOTE says of the tokens that are not dense.
NOTHING, CODES, COUNTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# What ROTARY says of positions: none, a table of angles, the same of consecutive positions.
UNROTATED, ANGLES, CONSECUTIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

LN_2 = tl.constexpr(0.6931471805599453)

_STRIDES = [f"{x}_{axis}" for x, axes in (("query", "bhm"), ("key", "bhl"), ("value", "bhl"))
            for axis in axes]  # fmt: skip
_SIZES = ["num_queries", "num_keys", "num_tokens", "codewords", "value_codewords", "codes_b"]


@triton.jit
def attend_to_dense(
    queries, key_rows, key_l, value_rows, value_l, key_mask, mask_offset,
    first_row, position, num_queries_per_kv, num_queries, num_keys, scale, m_i, l_i, acc,
    CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Takes this split's dense keys into the softmax (m_i, l_i, acc)."""
    first, last = split_of(num_keys, KEYS)
    before = num_keys - num_queries + 1  # query m sees m + before keys; bottom-right aligned
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
            keys = load_rows(key_rows + token * key_l, token_mask, HEAD, BLOCK)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if SCALED:
                scores *= scale
            if EDGE:
                score_mask = token_mask[None, :]
                if CAUSAL:
                    score_mask = score_mask & (token[None, :] < (position + before)[:, None])
                scores = tl.where(score_mask, scores, -float("inf"))
            elif KEY_MASK:
                scores = tl.where(token_mask[None, :], scores, -float("inf"))
            values = load_rows(value_rows + token * value_l, token_mask, HEAD, BLOCK)
            m_i, l_i, acc = online_softmax(scores, values, m_i, l_i, acc, scale, SCALED, PRECISION)
    return m_i, l_i, acc


@triton.jit
def relative_angles(
    cos, sin, num_tokens, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, KEYS: tl.constexpr
):
    """cos and sin, fp32 [KEYS, HALF_BLOCK], of 0, 1, 2 … steps from one position to the next.

    Divided by the first row's length, which is not 1 where the angle tables are scaled.
    """
    step = tl.arange(0, KEYS)
    channel = tl.arange(0, HALF_BLOCK)
    offset = step[:, None] * (2 * HALF) + channel[None, :]
    mask = (step < num_tokens)[:, None] & (channel < HALF)[None, :]
    cos_n = tl.load(cos + offset, mask=mask, other=0.0).to(tl.float32)
    sin_n = tl.load(sin + offset, mask=mask, other=0.0).to(tl.float32)
    cos_0 = tl.load(cos + channel, mask=channel < HALF, other=1.0).to(tl.float32)[None, :]
    sin_0 = tl.load(sin + channel, mask=channel < HALF, other=0.0).to(tl.float32)[None, :]
    length = cos_0 * cos_0 + sin_0 * sin_0
    return (cos_n * cos_0 + sin_n * sin_0) / length, (sin_n * cos_0 - cos_n * sin_0) / length


@triton.jit
def attend_to_codes(
    queries, queries_2, key_codes, value_codes, key_table, value_table,
    cos, sin, code_mask, mask_offset, head, num_kv_heads, num_tokens, codewords, value_codewords,
    scale, m_i, l_i, acc,
    ROTARY: tl.constexpr, CODE_MASK: tl.constexpr, BITS: tl.constexpr,
    SHARED: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr,
    VALUE_SHARED: tl.constexpr, VALUE_STAGES: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    KEYS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Takes this split's coded keys into the softmax.

    queries: [ROWS, BLOCK]; with ANGLES interleaved halves; CONSECUTIVE: the first half [ROWS,
    HALF_BLOCK], and ``queries_2`` the second one, in fp32.
    """
    HALF: tl.constexpr = HEAD // 2
    first, last = split_of(num_tokens, KEYS)
    whole = first
    if WHOLE and not CODE_MASK:
        whole = first + (last - first) // KEYS * KEYS
    channel = tl.arange(0, HALF_BLOCK)
    if ROTARY == CONSECUTIVE:
        key_cos, key_sin = relative_angles(cos, sin, num_tokens, HALF, HALF_BLOCK, KEYS)
    for EDGE in tl.static_range(0 if WHOLE else 1, 2):
        for start in range(whole if EDGE else first, last if EDGE else whole, KEYS):
            token = start + tl.arange(0, KEYS)
            token_mask = visible(token < last, code_mask, mask_offset + token, CODE_MASK)
            if ROTARY == UNROTATED:
                keys = look_up(
                    key_codes, key_table, token, token_mask, head, num_kv_heads, codewords,
                    0, HEAD, BLOCK, STAGES, GROUPS, HEAD // GROUPS, SHARED, BITS,
                ).to(DTYPE)  # fmt: skip
                tile_queries = queries
            else:
                key_1 = look_up(
                    key_codes, key_table, token, token_mask, head, num_kv_heads, codewords,
                    0, HALF, HALF_BLOCK, STAGES, GROUPS, HEAD // GROUPS, SHARED, BITS,
                )  # fmt: skip
                key_2 = look_up(
                    key_codes, key_table, token, token_mask, head, num_kv_heads, codewords,
                    HALF, HALF, HALF_BLOCK, STAGES, GROUPS, HEAD // GROUPS, SHARED, BITS,
                )  # fmt: skip
                if ROTARY == CONSECUTIVE:
                    angle = start * HEAD + channel
                    cos_0 = tl.load(cos + angle, mask=channel < HALF, other=0.0)[None, :]
                    sin_0 = tl.load(sin + angle, mask=channel < HALF, other=0.0)[None, :]
                    tile_queries = interleaved(*rotated(queries, queries_2, cos_0, -sin_0, DTYPE))
                else:
                    key_cos = load_rows(cos + token * HEAD, token_mask, HALF, HALF_BLOCK)
                    key_sin = load_rows(sin + token * HEAD, token_mask, HALF, HALF_BLOCK)
                    tile_queries = queries
                keys = interleaved(*rotated(key_1, key_2, key_cos, key_sin, DTYPE))
            scores = tl.dot(tile_queries, tl.trans(keys), input_precision=PRECISION)
            if SCALED:
                scores *= scale
            if EDGE:
                scores = tl.where(token_mask[None, :], scores, -float("inf"))
            values = look_up(
                value_codes, value_table, token, token_mask, head, num_kv_heads, value_codewords,
                0, HEAD, BLOCK, VALUE_STAGES, VALUE_GROUPS, HEAD // VALUE_GROUPS,
                VALUE_SHARED, BITS,
            ).to(DTYPE)  # fmt: skip
            m_i, l_i, acc = online_softmax(scores, values, m_i, l_i, acc, scale, SCALED, PRECISION)
    return m_i, l_i, acc


@triton.jit
def attend_to_codewords(
    queries, key_rows, value_rows, bias, codewords, scale, m_i, l_i, acc,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes this split's codewords into the softmax: n equal keys add n exp2(s), bias log2(n)."""
    first, last = split_of(codewords, KEYS)
    for start in range(first, last, KEYS):
        codeword = start + tl.arange(0, KEYS)
        log_count = tl.load(bias + codeword, mask=codeword < last, other=-float("inf"))
        codeword_mask = log_count != -float("inf")
        keys = load_rows(key_rows + codeword * HEAD, codeword_mask, HEAD, BLOCK).to(DTYPE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = scores * scale + log_count[None, :]
        values = load_rows(value_rows + codeword * HEAD, codeword_mask, HEAD, BLOCK).to(DTYPE)
        m_i, l_i, acc = online_softmax(scores, values, m_i, l_i, acc, scale, True, PRECISION)
    return m_i, l_i, acc


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES, "value_codes_b", "bias_b", "bias_h"])
def attend(
    query, query_b, query_h, query_m,  # [B, H, M, d], strides of B, H, M in units of UNIT elements
    out, lse,  # [B, M, H, d], [B, H, M]; PARTIAL: [splits, B*Hkv, M*G, d] and without d, fp32
    key, key_b, key_h, key_l, value, value_b, value_h, value_l, key_mask,  # [B, Hkv, L, d]; [B, L]
    codes, codes_b, value_codes, value_codes_b, key_table, value_table,  # [B, N, C]; tables
    cos, sin, angles_b, code_mask,  # [N, d] or [B, N, d]; [B, N]
    bias, bias_b, bias_h,  # log2 of counts, fp32 [B, 1 or Hkv, K], strides of B and Hkv
    num_queries_per_kv, num_kv_heads, num_queries, num_keys, num_tokens,  # G, Hkv, M, L, N
    codewords, value_codewords,  # K of keys, of values
    scale, sign,  # |scale| of the scores in base 2, and its sign
    DENSE: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
    REMOTE: tl.constexpr, ROTARY: tl.constexpr, CODE_MASK: tl.constexpr,
    BITS: tl.constexpr, SHARED: tl.constexpr, VALUE_SHARED: tl.constexpr,
    STAGES: tl.constexpr, GROUPS: tl.constexpr,  # R, S of keys
    VALUE_STAGES: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,  # d; d and d/2 padded
    ROWS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD // 2
    DTYPE: tl.constexpr = query.dtype.element_ty
    SCALED: tl.constexpr = REMOTE == COUNTS  # scores carry the scale, as a bias is added to them
    batch = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    head = tl.program_id(2) % num_kv_heads
    tile = tl.program_id(0)
    if CAUSAL:  # the last rows see most: they start first, so that none is left to wait for
        tile = tl.num_programs(0) - 1 - tile
    first_row = tile * ROWS
    row = first_row + tl.arange(0, ROWS)
    row_mask = row < num_queries * num_queries_per_kv
    position = row // num_queries_per_kv
    query_head = head * num_queries_per_kv + row % num_queries_per_kv
    query_offset = batch * query_b + query_head * query_h + position * query_m
    query_row = query + query_offset * UNIT
    if DENSE or ROTARY == UNROTATED:
        queries = (load_rows(query_row, row_mask, HEAD, BLOCK) * sign).to(DTYPE)
    m_i = tl.full([ROWS], -float("inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)

    if DENSE:
        m_i, l_i, acc = attend_to_dense(
            queries, key + (batch * key_b + head * key_h) * UNIT, key_l * UNIT,
            value + (batch * value_b + head * value_h) * UNIT, value_l * UNIT, key_mask,
            batch * num_keys,
            first_row, position, num_queries_per_kv, num_queries, num_keys, scale, m_i, l_i, acc,
            CAUSAL, KEY_MASK, HEAD, BLOCK, ROWS, KEYS, WHOLE, PRECISION, SCALED,
        )  # fmt: skip
    if REMOTE == CODES:
        queries_2 = 0
        if ROTARY == CONSECUTIVE:
            queries_2 = load_rows(query_row + HALF, row_mask, HALF, HALF_BLOCK) * sign
            queries_1 = load_rows(query_row, row_mask, HALF, HALF_BLOCK) * sign
        elif ROTARY == ANGLES:
            # Loaded in the keys' order: queries put together in registers would stay there.
            pair = tl.arange(0, 2 * HALF_BLOCK)
            channel = pair % 2 * HALF + pair // 2
            mask = row_mask[:, None] & (pair // 2 < HALF)[None, :]
            queries_1 = tl.load(query_row[:, None] + channel[None, :], mask=mask, other=0.0)
            queries_1 = (queries_1 * sign).to(DTYPE)
        else:
            queries_1 = queries
        key_codes = codes + batch * codes_b
        val_codes = key_codes  # one load of a code then serves both
        if value_codes is not None:
            val_codes = value_codes + batch * value_codes_b
        angles = batch * angles_b
        m_i, l_i, acc = attend_to_codes(
            queries_1, queries_2, key_codes, val_codes, key_table, value_table,
            cos + angles if ROTARY else cos, sin + angles if ROTARY else sin,
            code_mask, batch * num_tokens, head, num_kv_heads, num_tokens,
            codewords, value_codewords, scale, m_i, l_i, acc,
            ROTARY, CODE_MASK, BITS, SHARED, STAGES, GROUPS,
            VALUE_SHARED, VALUE_STAGES, VALUE_GROUPS,
            HEAD, BLOCK, HALF_BLOCK, DTYPE, KEYS, WHOLE, PRECISION, SCALED,
        )  # fmt: skip
    if REMOTE == COUNTS:
        table = head * codewords * HEAD
        m_i, l_i, acc = attend_to_codewords(
            queries, key_table + table, value_table + table, bias + batch * bias_b + head * bias_h,
            codewords, scale, m_i, l_i, acc, HEAD, BLOCK, DTYPE, KEYS, PRECISION,
        )  # fmt: skip

    empty = l_i == 0.0
    acc = acc / tl.where(empty, 1.0, l_i)[:, None]
    if not SCALED:
        m_i *= scale
    lse_2 = m_i + tl.log2(tl.where(empty, 1.0, l_i))  # -inf where nothing was seen
    channel = tl.arange(0, BLOCK)
    out_mask = row_mask[:, None] & (channel < HEAD)[None, :]
    if PARTIAL:
        split = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
        offset = split * (num_queries * num_queries_per_kv) + row
        tl.store(lse + offset, lse_2, mask=row_mask)
    else:
        heads = num_kv_heads * num_queries_per_kv
        offset = (batch * num_queries + position) * heads + query_head
        lse_offset = (batch * heads + query_head) * num_queries + position
        tl.store(lse + lse_offset, lse_2 * LN_2, mask=row_mask)
    acc = acc.to(out.dtype.element_ty)
    tl.store(out + offset[:, None] * HEAD + channel[None, :], acc, mask=out_mask)


@triton.jit(do_not_specialize=["num_queries", "num_splits", "pairs"])
def combine(
    part_out, part_lse,  # [splits, B*Hkv, M*G, d] and without d, fp32, in base 2
    out, lse,  # [B, M, H, d], [B, H, M]
    num_queries_per_kv, num_kv_heads, num_queries, num_splits, pairs,  # G, Hkv, M, splits, B*Hkv
    HEAD: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One softmax out of the splits' partial ones, for ROWS rows of a KV head."""
    rows = num_queries * num_queries_per_kv
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1)
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (split < num_splits)[None, :]
    offset = (split[None, :] * pairs + pair).to(tl.int64) * rows + row[:, None]
    lse_2 = tl.load(part_lse + offset, mask=mask, other=-float("inf"))
    largest = tl.max(lse_2, 1)
    weights = tl.exp2(lse_2 - tl.where(largest == -float("inf"), 0.0, largest)[:, None])
    total = tl.sum(weights, 1)
    total = tl.where(total == 0.0, 1.0, total)
    parts = tl.load(
        part_out + offset[:, :, None] * HEAD + channel,
        mask=mask[:, :, None] & (channel < HEAD),
        other=0.0,
    )
    mean = tl.sum(parts * weights[:, :, None], 1) / total[:, None]
    batch = (pair // num_kv_heads).to(tl.int64)
    head = (pair % num_kv_heads) * num_queries_per_kv + row % num_queries_per_kv
    heads = num_kv_heads * num_queries_per_kv
    position = row // num_queries_per_kv
    target = ((batch * num_queries + position) * heads + head)[:, None] * HEAD + channel[None, :]
    out_mask = (row < rows)[:, None] & (channel < HEAD)[None, :]
    tl.store(out + target, mean.to(out.dtype.element_ty), mask=out_mask)
    lse_offset = (batch * heads + head) * num_queries + position
    tl.store(lse + lse_offset, (largest + tl.log2(total)) * LN_2, mask=row < rows)
