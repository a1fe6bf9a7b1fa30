"""Codes to dense vectors: one pass that looks up, sums stages and rotates.

An item is a run of VECTOR channels (with rotary positions the same run of both halves) of one token
and head. It lies within one sub-vector, so it is one read of up to 16 bytes a stage, whatever the
head size is, and consecutive items are written one after the other.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from astra_kernels._triton.blocks import read_codes, rotated
from astra_kernels._triton.launch import cdiv, launch
from astra_kernels._triton.packed import as_words

WARPS = 4
THREADS = 32 * WARPS
VECTOR_BYTES = 16  # the widest load and store
ITEMS = 4  # of a thread: reads under way at once


@triton.jit
def load_run(
    codes, table, offset, row, channel, token_mask, codewords,
    VECTOR: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, BITS: tl.constexpr,
    CODES: tl.constexpr, ROWS: tl.constexpr,  # codes of a stage, sub-vectors of a stage
):  # fmt: skip
    """VECTOR channels from ``channel`` on, [n, VECTOR]: of the table's dtype, fp32 where summed."""
    group = channel // WIDTH
    lane = (channel % WIDTH)[:, None] + tl.arange(0, VECTOR)[None, :]
    offset += group
    row += group
    for stage in tl.static_range(STAGES):
        code = read_codes(codes, offset + stage * CODES, token_mask, codewords, BITS)
        start = ((row + stage * ROWS) * codewords + code).to(tl.int64) * WIDTH
        part = tl.load(table + start[:, None] + lane, mask=token_mask[:, None], other=0.0)
        if stage == 0:
            vectors = part
        else:
            vectors = vectors.to(tl.float32) + part.to(tl.float32)
    return vectors


@triton.jit(do_not_specialize=["codes_b", "tokens", "codewords"])
def expand_codes(
    codes, codes_b, table, cos, cos_b, sin, sin_b, code_mask,  # strides of B; mask [B, N]
    out, tokens, codewords,  # [B, N, Hkv, d]; N, K
    BITS: tl.constexpr, SHARED: tl.constexpr, ROTARY: tl.constexpr, MASK: tl.constexpr,
    STAGES: tl.constexpr, HEADS: tl.constexpr,  # R, Hkv
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,  # S, d/S
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,  # channels of an item, items of a program
):  # fmt: skip
    """A program owns BLOCK items of a batch row."""
    HEAD: tl.constexpr = GROUPS * WIDTH
    REACH: tl.constexpr = HEAD // 2 if ROTARY else HEAD  # channels that a head's items begin in
    RUNS: tl.constexpr = REACH // VECTOR
    CODES: tl.constexpr = GROUPS if SHARED else GROUPS * HEADS
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    first_token = first // (HEADS * RUNS)
    item = (first - first_token * (HEADS * RUNS)).to(tl.int32) + tl.arange(0, BLOCK)
    token = first_token + item // (HEADS * RUNS)
    head = item // RUNS % HEADS
    channel = item % RUNS * VECTOR
    row_mask = token < tokens
    token_mask = row_mask
    if MASK:
        token_mask = row_mask & (
            tl.load(code_mask + batch * tokens + token, mask=row_mask, other=0) != 0
        )
    codes += batch * codes_b
    offset = token * (STAGES * CODES)
    if not SHARED:
        offset += head * GROUPS
    row = head * GROUPS
    one = load_run(
        codes, table, offset, row, channel, token_mask, codewords,
        VECTOR, WIDTH, STAGES, BITS, CODES, HEADS * GROUPS,
    )  # fmt: skip
    lane = tl.arange(0, VECTOR)[None, :]
    target = out + ((batch * tokens + first_token) * HEADS * HEAD)
    DTYPE: tl.constexpr = out.dtype.element_ty
    if ROTARY:
        two = load_run(
            codes, table, offset, row, channel + REACH, token_mask, codewords,
            VECTOR, WIDTH, STAGES, BITS, CODES, HEADS * GROUPS,
        )  # fmt: skip
        angle = (token * HEAD + channel)[:, None] + lane
        mask = token_mask[:, None]
        turn_cos = tl.load(cos + batch * cos_b + angle, mask=mask, other=0.0)
        turn_sin = tl.load(sin + batch * sin_b + angle, mask=mask, other=0.0)
        offset_out = (item // RUNS * HEAD + channel)[:, None] + lane
        one, two = rotated(one, two, turn_cos, turn_sin, DTYPE)
        tl.store(target + offset_out, one, mask=row_mask[:, None])
        tl.store(target + offset_out + REACH, two, mask=row_mask[:, None])
    else:  # items are written one after the other
        offset_out = item[:, None] * VECTOR + lane
        tl.store(target + offset_out, one.to(DTYPE), mask=row_mask[:, None])


def expand(
    codes: Tensor,
    table: Tensor,
    batch: int,
    tokens: int,
    *,
    shared: bool,
    code_bits: int | None,
    dtype: torch.dtype,
    rope: tuple[Tensor, Tensor] | None = None,
    code_mask: Tensor | None = None,
) -> Tensor:
    """The vectors that codes stand for, [B, Hkv, N, d] of ``dtype``, stored as [B, N, Hkv, d].

    codes: int32 or int64 [B, N, C], or uint8 [B, bytes] with ``code_bits``. A code out of range is
    taken for the last codeword. table: [R, Hkv, S, K, d/S]. shared: all heads have one set of
    codes, C = R*S. rope: (cos, sin), each [N, d] or [1 or B, N, d], of which
    the first d/2 channels are read: the second half of an angle table repeats the first.
    code_mask: bool [B, N]; hidden tokens give zeros.
    """
    stages, heads, groups, codewords, width = table.shape
    out = table.new_empty((batch, tokens, heads, groups * width), dtype=dtype)
    if out.numel() == 0:
        return out.transpose(1, 2)
    codes, table = as_words(codes, code_bits), table.contiguous()
    vector = _vector(table, dtype, rope is not None)
    runs = groups * width // vector // (1 if rope is None else 2)
    block = THREADS * (ITEMS if rope is None else ITEMS // 2)
    (cos, cos_b), (sin, sin_b) = (_angles(x) for x in rope or (None, None))
    launch(
        expand_codes,
        (cdiv(tokens * heads * runs, block), batch),
        codes,
        codes.stride(0),
        table,
        cos,
        cos_b,
        sin,
        sin_b,
        None if code_mask is None else code_mask.contiguous(),
        out,
        tokens,
        codewords,
        device=codes.device,
        warps=WARPS,
        stages=1,
        BITS=code_bits or 0,
        SHARED=shared,
        ROTARY=rope is not None,
        MASK=code_mask is not None,
        STAGES=stages,
        HEADS=heads,
        GROUPS=groups,
        WIDTH=width,
        VECTOR=vector,
        BLOCK=block,
    )
    return out.transpose(1, 2)


def _vector(table: Tensor, dtype: torch.dtype, rotary: bool) -> int:
    """Channels of an item: a power of two that divides sub-vectors, and halves where they turn."""
    groups, width = table.shape[2], table.shape[4]
    widest = VECTOR_BYTES // min(table.element_size(), dtype.itemsize)
    return math.gcd(widest, width, groups * width // 2 if rotary else width)


def _angles(table: Tensor | None) -> tuple[Tensor | None, int]:
    """A table of angles and its stride from one batch row to the next, 0 where all share one."""
    if table is None:
        return None, 0
    if table.ndim == 3 and (table.shape[0] == 1 or table.stride(0) == 0):
        table = table[0]
    table = table.contiguous()
    return table, table.stride(0) if table.ndim == 3 else 0
