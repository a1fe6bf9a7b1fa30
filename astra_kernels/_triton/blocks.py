"""Building blocks of the kernels: reading codes, looking codewords up, the running softmax.

Names: a kernel's pointers are called after their tensors, ``BLOCK_*`` are tile sizes, and sizes in
capitals are compile-time constants.
"""

import triton
import triton.language as tl


@triton.jit
def read_codes(codes, index, mask, codewords, BITS: tl.constexpr):
    """Codes at ``index``, int32 in [0, codewords); 0 where ``mask`` is false.

    BITS 0: integers. Otherwise a bit-stream, code i at bits [i*BITS, (i+1)*BITS), LSB first.
    A code out of range becomes the last codeword, so that no table is read outside.
    """
    if BITS == 0:
        code = tl.load(codes + index, mask=mask, other=0)
    else:
        bit = index * BITS
        byte = codes + (bit >> 3)
        shift = (bit & 7).to(tl.int32)
        code = tl.load(byte, mask=mask, other=0).to(tl.int32)
        if BITS > 1:  # a code of two bits may end in the next byte, one of ten in the third
            code |= tl.load(byte + 1, mask=mask & (shift + BITS > 8), other=0).to(tl.int32) << 8
        if BITS > 9:
            code |= tl.load(byte + 2, mask=mask & (shift + BITS > 16), other=0).to(tl.int32) << 16
        code = (code >> shift) & ((1 << BITS) - 1)
    return tl.where((code >= 0) & (code < codewords), code, codewords - 1).to(tl.int32)


@triton.jit
def load_rows(rows, seen, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """CHANNELS contiguous channels from each of the pointers ``rows`` [n]; 0 where not seen."""
    channel = tl.arange(0, BLOCK)
    mask = seen[:, None]
    if CHANNELS != BLOCK:
        mask = mask & (channel < CHANNELS)[None, :]
    return tl.load(rows[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def unhidden(seen, mask, place, MASK: tl.constexpr):
    """``seen`` [n], less what the boolean ``mask`` hides, if there is one (MASK)."""
    if MASK:
        seen = seen & (tl.load(mask + place, mask=seen, other=0) != 0)
    return seen


@triton.jit
def look_up(
    codes,
    table,
    token,
    mask,
    head,
    kv_heads,
    codewords,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
):
    """Channels [FIRST, FIRST + CHANNELS) of the vectors that tokens' codes stand for.

    codes [N, C], table [R, Hkv, S, K, w] with R = STAGES, S = GROUPS, w = WIDTH; token and mask
    [n]. Gives [n, BLOCK], zero in padding and where ``mask`` is false, of the table's dtype, or
    fp32 where stages were summed.
    """
    if SHARED:
        codes_per_stage = GROUPS
        first_code = 0
    else:
        codes_per_stage = GROUPS * kv_heads
        first_code = head * GROUPS
    place = token * (STAGES * codes_per_stage) + first_code
    row = head * (GROUPS * codewords)
    vectors = look_up_stage(
        codes, table, place, row, mask, codewords,
        FIRST, CHANNELS, BLOCK, GROUPS, WIDTH, BITS,
    )  # fmt: skip
    if STAGES == 1:
        return vectors
    else:  # the compiler wants one type of all returns that it sees
        total = vectors.to(tl.float32)
        for _ in tl.static_range(STAGES - 1):
            place += codes_per_stage
            row += kv_heads * (GROUPS * codewords)
            vectors = look_up_stage(
                codes, table, place, row, mask, codewords,
                FIRST, CHANNELS, BLOCK, GROUPS, WIDTH, BITS,
            )  # fmt: skip
            total += vectors.to(tl.float32)
        return total


@triton.jit
def look_up_stage(
    codes,
    table,
    place,
    row,
    mask,
    codewords,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
):
    """One stage of ``look_up``: a token's codes start at ``place``, the table's rows at ``row``."""
    if GROUPS == 1:
        code = read_codes(codes, place, mask, codewords, BITS)
        return load_rows(table + (row + code) * WIDTH + FIRST, mask, CHANNELS, BLOCK)
    else:  # runs of VECTOR channels lie within one sub-vector: each is one contiguous read
        VECTOR: tl.constexpr = run_length(FIRST, CHANNELS, WIDTH)
        run = tl.arange(0, BLOCK // VECTOR) * VECTOR
        group = (FIRST + run) // WIDTH
        seen = mask[:, None] & (run < CHANNELS)[None, :]
        code = read_codes(codes, place[:, None] + group[None, :], seen, codewords, BITS)
        rows = (row + (group * codewords)[None, :] + code) * WIDTH
        start = table + rows + ((FIRST + run) % WIDTH)[None, :]
        channel = tl.arange(0, VECTOR)
        vectors = tl.load(start[:, :, None] + channel, mask=seen[:, :, None], other=0.0)
        return vectors.reshape(place.shape[0], BLOCK)


@triton.constexpr_function
def run_length(first, channels, width):
    """Largest power of two that divides a sub-vector and both ends of a range of channels."""
    run = 1
    while first % (2 * run) == 0 and channels % (2 * run) == 0 and width % (2 * run) == 0:
        run *= 2
    return run


@triton.jit
def turned(one, two, cos, sin, DTYPE: tl.constexpr):
    """Rotate-half positions for the two halves of vectors, computed in fp32."""
    one, two = one.to(tl.float32), two.to(tl.float32)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    return (one * cos - two * sin).to(DTYPE), (two * cos + one * sin).to(DTYPE)


@triton.jit
def interleaved(one, two):
    """Halves [n, d/2] of vectors as [n, d], channel by channel in turn; costs no data movement.

    Queries and keys in that order have the same products, summed in another order.
    """
    return tl.join(one, two).reshape(one.shape[0], 2 * one.shape[1])


@triton.jit
def take_in(scores, values, top, total, acc, PRECISION: tl.constexpr):
    """The running softmax takes in a tile: scores [m, n] in base 2, values [n, d].

    top [m] is the largest score so far, total [m] the sum of exp2(score - top), acc [m, d] the same
    sum weighted by the values. A row that has seen nothing keeps top -inf and total 0.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def share_of(tokens, TILE: tl.constexpr):
    """This program's part [first, last) of ``tokens`` keys, in whole tiles, on grid axis 1."""
    size = tl.cdiv(tl.cdiv(tokens, TILE), tl.num_programs(1)) * TILE
    first = tl.minimum(tl.program_id(1) * size, tokens)
    return first, tl.minimum(first + size, tokens)
