"""One attention kernel for every kind of key: dense, coded, and codewords with counts.

A program owns a tile of queries of one KV head and one share of the keys. The query heads of a KV
head are folded into the rows, row = m * G + g, so that they share every lookup. Keys pass by in
tiles: the dense ones first, then those known by codes, or the codewords with ln(count) where equal
codes have equal keys. One running softmax takes in all of them. With several shares (split keys,
for few queries) each writes its partial softmax, and ``combine`` makes one out of them.

Rotary positions turn looked-up keys in halves, score = q1.(k1 c - k2 s) + q2.(k2 c + k1 s): no row
is read twice, which loading its rotated half again would do, and angle tables are read by half. The
turned halves are interleaved, in queries and keys alike, so that one matrix product takes both.

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
    share_of,
    take_in,
    turned,
    unhidden,
)

# What REMOTE says of the tokens that are not dense.
NOTHING, CODES, COUNTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

LN_2 = tl.constexpr(0.6931471805599453)

_SIZES = ["queries", "locals_", "tokens", "codewords", "value_codewords", "codes_b"]


@triton.jit(do_not_specialize=[*_SIZES, "value_codes_b", "counts_b"])
def attend(
    query, query_b, query_h, query_m,  # [B, H, M, d] and strides of B, H, M
    out, lse,  # [B, M, H, d], [B, H, M]; PARTIAL: [shares, B*Hkv, M*G, d] and without d, fp32
    key, key_b, key_h, key_l, value, value_b, value_h, value_l, key_mask,  # [B, Hkv, L, d]; [B, L]
    codes, codes_b, value_codes, value_codes_b, key_table, value_table,  # [B, N, C]; tables
    cos, sin, angles_b, code_mask,  # [N, d] or [B, N, d]; [B, N]
    counts, counts_b, counts_h,  # [B, 1 or Hkv, K], strides of B and Hkv
    fold, kv_heads, queries, locals_, tokens, codewords, value_codewords,  # G, Hkv, M, L, N, K
    scale,  # of the scores, in base 2
    DENSE: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
    REMOTE: tl.constexpr, ROTARY: tl.constexpr, CODE_MASK: tl.constexpr,
    BITS: tl.constexpr, SHARED: tl.constexpr, VALUE_SHARED: tl.constexpr,
    STAGES: tl.constexpr, GROUPS: tl.constexpr,  # R, S of keys
    VALUE_STAGES: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,  # d; d and d/2 padded
    ROWS: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD // 2
    DTYPE: tl.constexpr = query.dtype.element_ty
    batch = (tl.program_id(2) // kv_heads).to(tl.int64)
    head = tl.program_id(2) % kv_heads
    tile = tl.program_id(0)
    if CAUSAL:  # the last rows see most: they start first, so that none is left to wait for
        tile = tl.num_programs(0) - 1 - tile
    first_row = tile * ROWS
    row = first_row + tl.arange(0, ROWS)
    there = row < queries * fold
    position = row // fold
    query_head = head * fold + row % fold
    query_row = query + batch * query_b + query_head * query_h + position * query_m
    if DENSE or not ROTARY:
        queries_plain = load_rows(query_row, there, HEAD, BLOCK)
    if ROTARY:
        # Loaded in the keys' order: queries put together in registers would stay there.
        pair = tl.arange(0, 2 * HALF_BLOCK)
        channel = pair % 2 * HALF + pair // 2
        mask = there[:, None] & (pair // 2 < HALF)[None, :]
        queries_coded = tl.load(query_row[:, None] + channel[None, :], mask=mask, other=0.0)
    else:
        queries_coded = queries_plain
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)

    if DENSE:
        first, last = share_of(locals_, KEYS)
        before = locals_ - queries + 1  # query m sees m + before keys; bottom-right aligned
        whole = first
        if CAUSAL:
            last = tl.minimum(last, (first_row + ROWS - 1) // fold + before)
            if WHOLE:
                seen_by_all = tl.minimum(last, first_row // fold + before)
                whole = first + tl.maximum(seen_by_all - first, 0) // KEYS * KEYS
        elif WHOLE and not KEY_MASK:
            whole = first + (last - first) // KEYS * KEYS
        key_rows = key + batch * key_b + head * key_h
        value_rows = value + batch * value_b + head * value_h
        for EDGE in tl.static_range(0 if WHOLE else 1, 2):
            for start in range(whole if EDGE else first, last if EDGE else whole, KEYS):
                token = start + tl.arange(0, KEYS)
                seen = unhidden(token < last, key_mask, batch * locals_ + token, KEY_MASK)
                keys = load_rows(key_rows + token * key_l, seen, HEAD, BLOCK)
                scores = tl.dot(queries_plain, tl.trans(keys), input_precision=PRECISION) * scale
                if EDGE:
                    visible = seen[None, :]
                    if CAUSAL:
                        visible = visible & (token[None, :] < (position + before)[:, None])
                    scores = tl.where(visible, scores, -float("inf"))
                elif KEY_MASK:
                    scores = tl.where(seen[None, :], scores, -float("inf"))
                values = load_rows(value_rows + token * value_l, seen, HEAD, BLOCK)
                top, total, acc = take_in(scores, values, top, total, acc, PRECISION)

    if REMOTE == CODES:
        first, last = share_of(tokens, KEYS)
        whole = first
        if WHOLE and not CODE_MASK:
            whole = first + (last - first) // KEYS * KEYS
        key_codes = codes + batch * codes_b
        val_codes = key_codes  # one load of a code then serves both
        if value_codes is not None:
            val_codes = value_codes + batch * value_codes_b
        for EDGE in tl.static_range(0 if WHOLE else 1, 2):
            for start in range(whole if EDGE else first, last if EDGE else whole, KEYS):
                token = start + tl.arange(0, KEYS)
                seen = unhidden(token < last, code_mask, batch * tokens + token, CODE_MASK)
                if ROTARY:
                    key_1 = look_up(
                        key_codes, key_table, token, seen, head, kv_heads, codewords,
                        0, HALF, HALF_BLOCK, STAGES, GROUPS, HEAD // GROUPS, SHARED, BITS,
                    )  # fmt: skip
                    key_2 = look_up(
                        key_codes, key_table, token, seen, head, kv_heads, codewords,
                        HALF, HALF, HALF_BLOCK, STAGES, GROUPS, HEAD // GROUPS, SHARED, BITS,
                    )  # fmt: skip
                    angle = batch * angles_b + token * HEAD
                    turn_cos = load_rows(cos + angle, seen, HALF, HALF_BLOCK)
                    turn_sin = load_rows(sin + angle, seen, HALF, HALF_BLOCK)
                    keys = interleaved(*turned(key_1, key_2, turn_cos, turn_sin, DTYPE))
                else:
                    keys = look_up(
                        key_codes, key_table, token, seen, head, kv_heads, codewords,
                        0, HEAD, BLOCK, STAGES, GROUPS, HEAD // GROUPS, SHARED, BITS,
                    ).to(DTYPE)  # fmt: skip
                scores = tl.dot(queries_coded, tl.trans(keys), input_precision=PRECISION) * scale
                if EDGE:
                    scores = tl.where(seen[None, :], scores, -float("inf"))
                values = look_up(
                    val_codes, value_table, token, seen, head, kv_heads, value_codewords,
                    0, HEAD, BLOCK, VALUE_STAGES, VALUE_GROUPS, HEAD // VALUE_GROUPS,
                    VALUE_SHARED, BITS,
                ).to(DTYPE)  # fmt: skip
                top, total, acc = take_in(scores, values, top, total, acc, PRECISION)

    if REMOTE == COUNTS:
        first, last = share_of(codewords, KEYS)
        for start in range(first, last, KEYS):
            codeword = start + tl.arange(0, KEYS)
            place = counts + batch * counts_b + head * counts_h + codeword
            count = tl.load(place, mask=codeword < last, other=0).to(tl.float32)
            seen = count > 0
            keys = key_table + (head * codewords + codeword) * HEAD
            keys = load_rows(keys, seen, HEAD, BLOCK).to(DTYPE)
            # n equal keys add n exp(score) = exp(score + ln n).
            weight = tl.where(seen, tl.log2(tl.where(seen, count, 1.0)), -float("inf"))
            scores = tl.dot(queries_coded, tl.trans(keys), input_precision=PRECISION) * scale
            scores += weight[None, :]
            values = value_table + (head * codewords + codeword) * HEAD
            values = load_rows(values, seen, HEAD, BLOCK).to(DTYPE)
            top, total, acc = take_in(scores, values, top, total, acc, PRECISION)

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse_2 = top + tl.log2(tl.where(empty, 1.0, total))  # -inf where nothing was seen
    channel = tl.arange(0, BLOCK)
    kept = there[:, None] & (channel < HEAD)[None, :]
    if PARTIAL:
        share = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
        place = share * (queries * fold) + row
        tl.store(lse + place, lse_2, mask=there)
    else:
        heads = kv_heads * fold
        place = (batch * queries + position) * heads + query_head
        tl.store(lse + (batch * heads + query_head) * queries + position, lse_2 * LN_2, mask=there)
    acc = acc.to(out.dtype.element_ty)
    tl.store(out + place[:, None] * HEAD + channel[None, :], acc, mask=kept)


@triton.jit(do_not_specialize=["queries", "shares", "pairs"])
def combine(
    part_out, part_lse,  # [shares, B*Hkv, M*G, d] and without d, fp32, in base 2
    out, lse,  # [B, M, H, d], [B, H, M]
    fold, kv_heads, queries, shares, pairs,  # G, Hkv, M, shares, B*Hkv
    HEAD: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One softmax out of the shares' partial ones, for ROWS rows of a KV head."""
    rows = queries * fold
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1)
    share = tl.arange(0, SHARES)
    channel = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (share < shares)[None, :]
    place = (share[None, :] * pairs + pair).to(tl.int64) * rows + row[:, None]
    lse_2 = tl.load(part_lse + place, mask=there, other=-float("inf"))
    top = tl.max(lse_2, 1)
    weight = tl.exp2(lse_2 - tl.where(top == -float("inf"), 0.0, top)[:, None])
    total = tl.sum(weight, 1)
    total = tl.where(total == 0.0, 1.0, total)
    parts = tl.load(
        part_out + place[:, :, None] * HEAD + channel,
        mask=there[:, :, None] & (channel < HEAD),
        other=0.0,
    )
    mean = tl.sum(parts * weight[:, :, None], 1) / total[:, None]
    batch = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads) * fold + row % fold
    heads = kv_heads * fold
    position = row // fold
    target = ((batch * queries + position) * heads + head)[:, None] * HEAD + channel[None, :]
    mask = (row < rows)[:, None] & (channel < HEAD)[None, :]
    tl.store(out + target, mean.to(out.dtype.element_ty), mask=mask)
    lse_place = (batch * heads + head) * queries + position
    tl.store(lse + lse_place, (top + tl.log2(total)) * LN_2, mask=row < rows)
