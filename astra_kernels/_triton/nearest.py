"""Nearest codeword on a GPU: a matmul whose results are compared in registers and never written.

A program owns a tile of rows of one group and a split of the codewords. The codewords pass by in
tiles, score = ||c||^2 / 2 - x.c comes out of the tensor cores, and the smallest score and its index
stay behind. Padding codewords have the norm infinity and padding rows repeat the last one, so that
neither needs a mask. Where rows and groups alone cannot fill the chip, the codewords are split over
programs; each split leaves (score, index) in scratch and ``finish`` compares the splits, in their
order, so that results do not depend on which program was first.

How the minimum is kept depends on what takes the time. For w channels a score costs w / 2048 clocks
of a Hopper multiprocessor's tensor cores, and n instructions on it n / 128. Narrow groups, whose
channels fit one step, are bound by the comparison: minimum and tile number stay apart for every
element of the tile (subtract, compare, two selects: four instructions a score) and are reduced over
the columns once, at the end. That takes three registers a score, which wide groups have a better
use for: larger tiles, which read less. There every tile is reduced at once, at about six
instructions a score, 12 % of the matmul at w = 768.
"""

import triton
import triton.language as tl

from astra_kernels._triton.blocks import split_of

LAST_INDEX = tl.constexpr(2**31 - 1)

# Splits that ``finish`` looks at together.
SPLITS_AT_ONCE = tl.constexpr(8)


@triton.jit
def load_channels(base, rows, start, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """Channels [start, start + DEPTH) of the rows that lie ``rows`` [n] behind ``base``; 0 beyond.

    One pointer for all and 32-bit offsets: pointers of its own for every row cost registers.
    """
    channel = tl.arange(0, DEPTH)
    pointers = (base + start) + (rows[:, None] + channel[None, :])
    if CHANNELS % DEPTH == 0:
        part = tl.load(pointers)
    else:
        part = tl.load(pointers, mask=(start + channel < CHANNELS)[None, :], other=0.0)
    return part


@triton.jit
def products_of(vectors, codewords, total, EXACT: tl.constexpr):
    """total [m, n] + the dot products of vectors [m, d] and codewords [n, d], as good as in fp32.

    EXACT: both are of one 16-bit dtype, whose products fp32 holds exactly.
    """
    if EXACT:
        total = tl.dot(vectors, tl.trans(codewords), total)
    else:
        vectors, codewords = vectors.to(tl.float32), codewords.to(tl.float32)
        total = tl.dot(vectors, tl.trans(codewords), total, input_precision="tf32x3")
    return total


@triton.jit
def smallest(scores, indices, AXIS: tl.constexpr):
    """Smallest of scores [m, n] along an axis and the lowest of its indices; NaN is never it."""
    low = tl.min(scores, AXIS)
    is_lowest = scores == tl.expand_dims(low, AXIS)
    return low, tl.min(tl.where(is_lowest, indices, LAST_INDEX), AXIS)


@triton.jit
def nearest_narrow(
    vectors, rows, codebook, half_norms, first, last, codewords,
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Smallest score [ROWS] and its index in codewords [first, last); all channels in one step."""
    vectors = load_channels(vectors, rows, 0, CHANNELS, DEPTH)
    column = tl.arange(0, COLUMNS)
    best = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    tile = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(first, last, COLUMNS):
        column_mask = column < codewords - start
        table_rows = tl.minimum(column, codewords - 1 - start) * CHANNELS
        table = codebook + tl.cast(start, tl.int64) * CHANNELS
        table = load_channels(table, table_rows, 0, CHANNELS, DEPTH)
        norm = tl.load(half_norms + start + column, mask=column_mask, other=float("inf"))
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        scores = norm[None, :] - products_of(vectors, table, products, EXACT)
        better = scores < best  # false of NaN
        best = tl.where(better, scores, best)
        tile = tl.where(better, start, tile)
    return smallest(best, tile + column[None, :], 1)


@triton.jit
def nearest_wide(
    vectors, rows, codebook, half_norms, first, last, codewords,
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The same with both sides read in steps of DEPTH channels, again for every tile."""
    column = tl.arange(0, COLUMNS)
    best = tl.full([ROWS], float("inf"), tl.float32)
    code = tl.zeros([ROWS], tl.int32)
    for start in range(first, last, COLUMNS):
        table = codebook + tl.cast(start, tl.int64) * CHANNELS
        table_rows = tl.minimum(column, codewords - 1 - start) * CHANNELS
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        for channel in range(0, CHANNELS, DEPTH):
            products = products_of(
                load_channels(vectors, rows, channel, CHANNELS, DEPTH),
                load_channels(table, table_rows, channel, CHANNELS, DEPTH),
                products, EXACT,
            )  # fmt: skip
        column_mask = column < codewords - start
        norm = tl.load(half_norms + start + column, mask=column_mask, other=float("inf"))
        low, index = smallest(norm[None, :] - products, column[None, :], 1)
        better = low < best
        best = tl.where(better, low, best)
        code = tl.where(better, start + index, code)
    return best, code


@triton.jit(do_not_specialize=["rows", "codewords"])
def nearest(
    vectors, row_stride, group_stride,  # [T, C, w], strides of T and C in units of UNIT elements
    codebook, half_norms,  # [C, K, w], [C, K] in fp32
    scores, codes,  # fp32 and int32 [splits, T, C]; not PARTIAL: codes int32 [T, C]
    rows, codewords,  # T, K
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr,  # w, and how many channels a step takes
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EXACT: tl.constexpr, PARTIAL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row_stride *= UNIT  # the compiler sees how wide it may read
    group_stride *= UNIT
    group = tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    vectors += first_row.to(tl.int64) * row_stride + group * group_stride
    rows_at = tl.minimum(tl.arange(0, ROWS), rows - 1 - first_row) * row_stride
    codebook += group * codewords * CHANNELS
    half_norms += group * codewords
    first, last = split_of(codewords, COLUMNS)
    if CHANNELS <= DEPTH:
        best, code = nearest_narrow(
            vectors, rows_at, codebook, half_norms, first, last, codewords,
            CHANNELS, DEPTH, ROWS, COLUMNS, EXACT,
        )  # fmt: skip
    else:
        best, code = nearest_wide(
            vectors, rows_at, codebook, half_norms, first, last, codewords,
            CHANNELS, DEPTH, ROWS, COLUMNS, EXACT,
        )  # fmt: skip
    offset = row.to(tl.int64) * tl.num_programs(2) + group
    if PARTIAL:
        offset += tl.program_id(1).to(tl.int64) * rows * tl.num_programs(2)
        tl.store(scores + offset, best, mask=row < rows)
    else:
        code = without_overflow(code, best)
    tl.store(codes + offset, code, mask=row < rows)


@triton.jit
def without_overflow(code, score):
    """A product that overflows comes of a vector that is infinitely far from all: code 0."""
    return tl.where(score == -float("inf"), 0, code)


@triton.jit
def best_of_splits(scores, codes, offset, mask, count, splits):
    """The code at ``offset`` out of every split's [splits, count]; 0 where ``mask`` is false."""
    best = tl.full(offset.shape, float("inf"), tl.float32)
    code = tl.zeros(offset.shape, tl.int32)
    for first in range(0, splits, SPLITS_AT_ONCE):
        split = first + tl.arange(0, SPLITS_AT_ONCE)
        offsets = split.to(tl.int64)[:, None] * count + offset[None, :]
        split_mask = (split < splits)[:, None] & mask[None, :]
        score = tl.load(scores + offsets, mask=split_mask, other=float("inf"))
        low, index = smallest(score, tl.load(codes + offsets, mask=split_mask, other=0), 0)
        better = low < best  # splits come in the codewords' order, so ties stay with the lower
        best = tl.where(better, low, best)
        code = tl.where(better, index, code)
    return without_overflow(code, best)


@triton.jit(do_not_specialize=["row_codes", "row_bytes", "splits"])
def finish(
    scores, codes,  # fp32 and int32 [splits, B, n], n codes in a row
    out,  # int32 [B, n]; uint8 [B, bytes] of codes packed in BITS
    row_codes, row_bytes, splits,  # n; elements in a row of out
    BITS: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,  # CODES: most that share a byte
):  # fmt: skip
    """Codes out of the splits' best; a program makes BLOCK elements of a row of ``out``."""
    batch = tl.program_id(1).to(tl.int64)
    count = tl.num_programs(1).to(tl.int64) * row_codes
    start = batch * row_codes
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if BITS == 0:
        value = best_of_splits(scores, codes, start + offset, offset < row_codes, count, splits)
    else:  # the byte's first code may begin in the byte before: its shift is negative then
        value = tl.zeros([BLOCK], tl.int32)
        for n in tl.static_range(CODES):
            index = offset * 8 // BITS + n
            shift = (index * BITS - offset * 8).to(tl.int32)
            code_mask = (index < row_codes) & (shift < 8)
            code = best_of_splits(scores, codes, start + index, code_mask, count, splits)
            up, down = tl.maximum(shift, 0), tl.maximum(-shift, 0)
            value |= tl.where(code_mask, (code << up) >> down, 0)
    out += batch * row_bytes
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=offset < row_bytes)


@triton.jit(do_not_specialize=["count"])
def half_norm(
    codebook, out, count,  # [count, w], fp32 [count]
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """||codeword||^2 / 2 without a copy of the codebook in fp32."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    codebook += first.to(tl.int64) * CHANNELS
    rows = tl.minimum(tl.arange(0, ROWS), count - 1 - first) * CHANNELS
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for channel in range(0, CHANNELS, DEPTH):
        part = load_channels(codebook, rows, channel, CHANNELS, DEPTH).to(tl.float32)
        total += part * part
    tl.store(out + row, tl.sum(total, 1) * 0.5, mask=row < count)
