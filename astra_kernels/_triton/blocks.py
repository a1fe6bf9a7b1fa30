"""Building blocks of the kernels: reading codes, looking codewords up, the running softmax.

Names: a kernel's pointers are called after their tensors, and names in capitals are compile-time
constants: HEAD, WIDTH, BITS … sizes of the problem, ROWS, KEYS, COLUMNS, DEPTH those of a tile,
BLOCK a number of channels or items, padded to a power of two.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)

# What UNITS says of scores: products, still to be multiplied by the scale; scores in base 2; scores
# as they are defined.
PLAIN, BASE_2, NATURAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def read_codes(codes, index, mask, codewords, BITS: tl.constexpr):
    """Codes at ``index``, int32 in [0, codewords); 0 where ``mask`` is false.

    BITS 0: integers. Otherwise a bit-stream in 32-bit words (``as_words``), code i at bits
    [i*BITS, (i+1)*BITS), LSB first. A code out of range becomes the last codeword, so that no table
    is read outside.
    """
    if BITS == 0:
        code = tl.load(codes + index, mask=mask, other=0)
        return tl.where((code >= 0) & (code < codewords), code, codewords - 1).to(tl.int32)
    else:
        bit = index * BITS
        word = codes + (bit >> 5)
        shift = (bit & 31).to(tl.int32)
        code = tl.load(word, mask=mask, other=0).to(tl.uint32, bitcast=True)
        if 32 % BITS == 0:
            code = code >> shift
        else:  # a code may end in the next word
            high = tl.load(word + 1, mask=mask & (shift + BITS > 32), other=0)
            code = (code.to(tl.uint64) | (high.to(tl.uint64) << 32)) >> shift
        code = code.to(tl.int32) & ((1 << BITS) - 1)
        return tl.minimum(code, codewords - 1)


@triton.jit
def load_rows(rows, row_mask, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """CHANNELS contiguous channels from each of the pointers ``rows`` [n]; 0 where masked."""
    channel = tl.arange(0, BLOCK)
    mask = row_mask[:, None]
    if CHANNELS != BLOCK:
        mask = mask & (channel < CHANNELS)[None, :]
    return tl.load(rows[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def visible(token_mask, mask, offset, MASK: tl.constexpr):
    """``token_mask`` [n], less what the boolean ``mask`` hides, if there is one (MASK)."""
    if MASK:
        token_mask = token_mask & (tl.load(mask + offset, mask=token_mask, other=0) != 0)
    return token_mask


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
    offset = token * (STAGES * codes_per_stage) + first_code
    row = head * (GROUPS * codewords)
    vectors = look_up_stage(
        codes, table, offset, row, mask, codewords,
        FIRST, CHANNELS, BLOCK, GROUPS, WIDTH, BITS,
    )  # fmt: skip
    if STAGES == 1:
        return vectors
    else:  # the compiler wants one type of all returns that it sees
        total = vectors.to(tl.float32)
        for _ in tl.static_range(STAGES - 1):
            offset += codes_per_stage
            row += kv_heads * (GROUPS * codewords)
            vectors = look_up_stage(
                codes, table, offset, row, mask, codewords,
                FIRST, CHANNELS, BLOCK, GROUPS, WIDTH, BITS,
            )  # fmt: skip
            total += vectors.to(tl.float32)
        return total


@triton.jit
def look_up_stage(
    codes,
    table,
    offset,
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
    """One stage of ``look_up``: codes start at ``offset``, the table's rows at ``row``."""
    if GROUPS == 1:
        code = read_codes(codes, offset, mask, codewords, BITS)
        return load_rows(table + (row + code) * WIDTH + FIRST, mask, CHANNELS, BLOCK)
    else:  # runs of VECTOR channels lie within one sub-vector: each is one contiguous read
        VECTOR: tl.constexpr = run_length(FIRST, CHANNELS, WIDTH)
        run = tl.arange(0, BLOCK // VECTOR) * VECTOR
        group = (FIRST + run) // WIDTH
        run_mask = mask[:, None] & (run < CHANNELS)[None, :]
        code = read_codes(codes, offset[:, None] + group[None, :], run_mask, codewords, BITS)
        rows = (row + (group * codewords)[None, :] + code) * WIDTH
        start = table + rows + ((FIRST + run) % WIDTH)[None, :]
        channel = tl.arange(0, VECTOR)
        vectors = tl.load(start[:, :, None] + channel, mask=run_mask[:, :, None], other=0.0)
        return vectors.reshape(offset.shape[0], BLOCK)


@triton.constexpr_function
def run_length(first, channels, width):
    """Largest power of two that divides a sub-vector and both ends of a range of channels."""
    run = 1
    while first % (2 * run) == 0 and channels % (2 * run) == 0 and width % (2 * run) == 0:
        run *= 2
    return run


@triton.jit
def rotated(one, two, cos, sin, DTYPE: tl.constexpr):
    """The two halves of vectors after rotate-half positions, computed in fp32."""
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
def capped(scores, softcap, PRECISION: tl.constexpr):
    """softcap * tanh(scores / softcap), in fp32."""
    x = scores * (1.0 / softcap)
    size = tl.abs(x)
    rest = tl.exp2(size * (-2.0 * LOG2_E))
    tanh = (1.0 - rest) / (1.0 + rest)
    if PRECISION != "ieee":  # in fp32 the difference is too coarse where it is small: a series
        square = x * x
        series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315)))
        tanh = tl.where(size < 0.2, size * series, tanh)
    return tl.where(x < 0.0, -softcap, softcap) * tanh


@triton.jit
def masked(scores, mask_rows, offset, row_mask, token_mask, EDGE: tl.constexpr):
    """Natural scores [m, n] under a mask per query: uint8, 0 hides, or floats that are added.

    mask_rows: [m] pointers, offset: [n]. A float of -inf hides whatever the score is. All tokens
    are there unless EDGE.
    """
    places = mask_rows[:, None] + offset[None, :]
    mask = row_mask[:, None]
    if EDGE:
        mask = mask & token_mask[None, :]
    if mask_rows.dtype.element_ty == tl.uint8:
        seen = tl.load(places, mask=mask, other=0) != 0
        return tl.where(seen, scores, -float("inf"))
    else:
        bias = tl.load(places, mask=mask, other=-float("inf")).to(tl.float32)
        return tl.where(bias == -float("inf"), bias, scores + bias)


@triton.jit
def online_softmax(
    scores, values, m_i, l_i, acc, scale, UNITS: tl.constexpr, PRECISION: tl.constexpr
):
    """The online softmax takes in a tile: scores [m, n], values [n, d].

    m_i [m] is the largest score so far, l_i [m] the sum of exp(score - m_i), acc [m, d] the same
    sum weighted by the values. A row that has seen nothing keeps m_i -inf and l_i 0. PLAIN scores
    and m_i are still to be multiplied by ``scale``, in base 2, which is positive: in one
    instruction with the difference.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    if UNITS == BASE_2:
        weights = tl.exp2(scores - base[:, None])
        alpha = tl.exp2(m_i - base)
    elif UNITS == NATURAL:  # the difference first: the smallest number in base 2 would be -inf
        weights = tl.exp2((scores - base[:, None]) * LOG2_E)
        alpha = tl.exp2((m_i - base) * LOG2_E)
    else:
        base *= scale
        weights = tl.exp2(scores * scale - base[:, None])
        alpha = tl.exp2(m_i * scale - base)
    l_i = l_i * alpha + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l_i, acc


@triton.jit
def split_of(tokens, TILE: tl.constexpr):
    """This program's part [first, last) of ``tokens`` keys, in whole tiles, on grid axis 1."""
    size = tl.cdiv(tl.cdiv(tokens, TILE), tl.num_programs(1)) * TILE
    first = tl.minimum(tl.program_id(1) * size, tokens)
    return first, tl.minimum(first + size, tokens)
