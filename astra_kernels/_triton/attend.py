"""One attention kernel for every kind of key: dense, coded, and codewords with counts.

A program owns a tile of queries of one KV head and one split of the keys. The query heads of a KV
head are rows of the tile, row = m * G + g, so that they share every lookup. Keys pass by in tiles:
the dense ones first, then those known by codes, or the codewords with log2(count) where equal codes
have equal keys (``loops``). One online softmax takes in all of them. With several splits (for few
queries) each writes its partial softmax, and ``combine`` makes one out of them.

Rotary positions rotate looked-up keys in halves, score = q1.(k1 c - k2 s) + q2.(k2 c + k1 s): no
row is read twice, which loading its rotated half again would do, and angle tables are read by half.
The rotated halves are interleaved, in queries and keys alike, so that one product takes both.

What a call does not have (a mask, a softcap, sinks, a window) is None, and the kernel is compiled
without it.
"""

import triton
import triton.language as tl

from astra_kernels._triton.blocks import LN_2, LOG2_E, NATURAL, PLAIN, load_rows
from astra_kernels._triton.loops import attend_to_codes, attend_to_codewords, attend_to_dense

# What REMOTE says of the tokens that are not dense.
NOTHING, CODES, COUNTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Not strides of masks: where rows begin at multiples of 16, a mask is read by vectors.
_STRIDES = [f"{x}_{axis}" for x, axes in (("query", "bhm"), ("key", "bhl"), ("value", "bhl"))
            for axis in axes]  # fmt: skip
_STRIDES += ["seen_b", "seen_h", "code_seen_b", "code_seen_h"]
_SIZES = ["num_queries", "num_keys", "num_tokens", "codewords", "value_codewords", "codes_b",
          "left", "right"]  # fmt: skip


@triton.jit
def first_state(sinks, query_head, row_mask, ROWS: tl.constexpr):
    """m_i and l_i before any key: of nothing, or in the first split of the head's sink."""
    m_i = tl.full([ROWS], -float("inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + query_head, mask=row_mask, other=-float("inf"))
        m_i = tl.where(tl.program_id(1) == 0, sink, -float("inf"))
        l_i = tl.where(m_i == -float("inf"), 0.0, 1.0)
    return m_i, l_i


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES, "value_codes_b", "bias_b", "bias_h"])
def attend(
    query, query_b, query_h, query_m,  # [B, H, M, d], strides of B, H, M in units of UNIT elements
    out, lse,  # [B, M, H, d], [B, H, M]; PARTIAL: [splits, B*Hkv, M*G, d] and without d, fp32
    key, key_b, key_h, key_l, value, value_b, value_h, value_l, key_mask,  # [B, Hkv, L, d]; [B, L]
    codes, codes_b, value_codes, value_codes_b, key_table, value_table,  # [B, N, C]; tables
    cos, sin, angles_b, code_mask,  # [N, d] or [B, N, d]; [B, N]
    bias, bias_b, bias_h,  # log2 of counts, fp32, or int32 counts [B, 1 or Hkv, K]; two strides
    num_queries_per_kv, num_kv_heads, num_queries, num_keys, num_tokens,  # G, Hkv, M, L, N
    codewords, value_codewords,  # K of keys, of values
    scale, sign,  # |scale| of the scores, in base 2 unless NATURAL, and its sign
    softcap, sinks, left, right,  # fp32 [H]; the window's limits
    attn_mask, attn_mask_b, attn_mask_h, attn_mask_m, attn_mask_l,  # [B, H, M, L], uint8 or float
    seen, seen_b, seen_h,  # [B, Hkv, L], uint8: whether attn_mask shows a key to any query
    code_attn_mask, code_attn_mask_b, code_attn_mask_h, code_attn_mask_m, code_attn_mask_n,
    code_seen, code_seen_b, code_seen_h,
    DENSE: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
    REMOTE: tl.constexpr, ROTARY: tl.constexpr, CODE_MASK: tl.constexpr,
    BITS: tl.constexpr, SHARED: tl.constexpr, VALUE_SHARED: tl.constexpr,
    STAGES: tl.constexpr, GROUPS: tl.constexpr,  # R, S of keys
    VALUE_STAGES: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,  # d; d and d/2 padded
    VALUE_HEAD: tl.constexpr, VALUE_BLOCK: tl.constexpr,  # d_v, padded
    UNITS: tl.constexpr,  # of scores, see ``loops``
    ROWS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD // 2
    DTYPE: tl.constexpr = query.dtype.element_ty
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
    if DENSE or not ROTARY:
        queries = (load_rows(query_row, row_mask, HEAD, BLOCK) * sign).to(DTYPE)
    m_i, l_i = first_state(sinks, query_head, row_mask, ROWS)
    acc = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)

    # Where the rows' parts of masks begin; strides of broadcast axes are 0.
    if attn_mask is not None:
        attn_mask += batch * attn_mask_b + query_head * attn_mask_h
        attn_mask += position.to(tl.int64) * attn_mask_m
        seen += batch * seen_b + head * seen_h
    if code_attn_mask is not None:
        code_attn_mask += batch * code_attn_mask_b + query_head * code_attn_mask_h
        code_attn_mask += position.to(tl.int64) * code_attn_mask_m
        code_seen += batch * code_seen_b + head * code_seen_h

    if DENSE:
        m_i, l_i, acc = attend_to_dense(
            queries, key + (batch * key_b + head * key_h) * UNIT, key_l * UNIT,
            value + (batch * value_b + head * value_h) * UNIT, value_l * UNIT, key_mask,
            batch * num_keys,
            attn_mask, attn_mask_l, seen, first_row, row_mask, position,
            num_queries_per_kv, num_queries, num_keys, left, right, scale, softcap, m_i, l_i, acc,
            CAUSAL, KEY_MASK, HEAD, BLOCK, VALUE_HEAD, VALUE_BLOCK, ROWS, KEYS, WHOLE, PRECISION,
            UNITS,
        )  # fmt: skip
    if REMOTE == CODES:
        if ROTARY:
            # Loaded in the keys' order: queries put together in registers would stay there.
            pair = tl.arange(0, 2 * HALF_BLOCK)
            channel = pair % 2 * HALF + pair // 2
            mask = row_mask[:, None] & (pair // 2 < HALF)[None, :]
            far_queries = tl.load(query_row[:, None] + channel[None, :], mask=mask, other=0.0)
            far_queries = (far_queries * sign).to(DTYPE)
        else:
            far_queries = queries
        key_codes = codes + batch * codes_b
        val_codes = key_codes  # one load of a code then serves both
        if value_codes is not None:
            val_codes = value_codes + batch * value_codes_b
        angles = batch * angles_b
        m_i, l_i, acc = attend_to_codes(
            far_queries, key_codes, val_codes, key_table, value_table,
            cos + angles if ROTARY else cos, sin + angles if ROTARY else sin,
            code_mask, batch * num_tokens,
            code_attn_mask, code_attn_mask_n, code_seen, row_mask, head, num_kv_heads, num_tokens,
            codewords, value_codewords, scale, softcap, m_i, l_i, acc,
            ROTARY, CODE_MASK, BITS, SHARED, STAGES, GROUPS,
            VALUE_SHARED, VALUE_STAGES, VALUE_GROUPS,
            HEAD, BLOCK, HALF_BLOCK, VALUE_HEAD, VALUE_BLOCK, DTYPE, KEYS, WHOLE, PRECISION, UNITS,
        )  # fmt: skip
    if REMOTE == COUNTS:
        first_codeword = head * codewords
        m_i, l_i, acc = attend_to_codewords(
            queries, key_table + first_codeword * HEAD, value_table + first_codeword * VALUE_HEAD,
            bias + batch * bias_b + head * bias_h, codewords, scale, softcap, m_i, l_i, acc,
            HEAD, BLOCK, VALUE_HEAD, VALUE_BLOCK, DTYPE, KEYS, PRECISION, UNITS,
        )  # fmt: skip

    empty = l_i == 0.0
    acc = acc / tl.where(empty, 1.0, l_i)[:, None]
    if UNITS == PLAIN:
        m_i *= scale
    log_sum = tl.log2(tl.where(empty, 1.0, l_i))
    if UNITS != NATURAL:
        lse_2 = m_i + log_sum  # -inf where nothing was seen, as m_i
    channel = tl.arange(0, VALUE_BLOCK)
    out_mask = row_mask[:, None] & (channel < VALUE_HEAD)[None, :]
    if PARTIAL:
        split = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
        offset = split * (num_queries * num_queries_per_kv) + row
        if UNITS == NATURAL:
            # Apart: beside a mask of the smallest number the logarithm of a sum would be lost.
            plane = (tl.num_programs(1) * tl.num_programs(2)).to(tl.int64)
            plane *= num_queries * num_queries_per_kv
            tl.store(lse + offset, m_i, mask=row_mask)
            tl.store(lse + plane + offset, l_i, mask=row_mask)
        else:
            tl.store(lse + offset, lse_2, mask=row_mask)
    else:
        heads = num_kv_heads * num_queries_per_kv
        offset = (batch * num_queries + position) * heads + query_head
        lse_offset = (batch * heads + query_head) * num_queries + position
        if UNITS == NATURAL:
            tl.store(lse + lse_offset, m_i + log_sum * LN_2, mask=row_mask)
        else:
            tl.store(lse + lse_offset, lse_2 * LN_2, mask=row_mask)
    acc = acc.to(out.dtype.element_ty)
    tl.store(out + offset[:, None] * VALUE_HEAD + channel[None, :], acc, mask=out_mask)


@triton.jit(do_not_specialize=["num_queries", "num_splits", "pairs"])
def combine(
    part_out, part_lse,  # [splits, B*Hkv, M*G, d_v] and without d_v, fp32, in base 2
    out, lse,  # [B, M, H, d], [B, H, M]
    num_queries_per_kv, num_kv_heads, num_queries, num_splits, pairs,  # G, Hkv, M, splits, B*Hkv
    HEAD: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,  # d_v
    UNITS: tl.constexpr,  # NATURAL: part_lse has m_i and l_i, [2, splits, B*Hkv, M*G]
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
    base = tl.where(largest == -float("inf"), 0.0, largest)[:, None]
    if UNITS == NATURAL:
        plane = (num_splits * pairs).to(tl.int64) * rows
        weights = tl.exp2((lse_2 - base) * LOG2_E)
        weights *= tl.load(part_lse + plane + offset, mask=mask, other=0.0)
    else:
        weights = tl.exp2(lse_2 - base)
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
    if UNITS == NATURAL:
        tl.store(lse + lse_offset, largest + tl.log2(total) * LN_2, mask=row < rows)
    else:
        tl.store(lse + lse_offset, (largest + tl.log2(total)) * LN_2, mask=row < rows)
