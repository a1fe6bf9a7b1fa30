"""Bit packing in Triton: the stream that `astra_kernels.pack` describes, on the device.

A program's bytes and codes begin where a whole number of them does, at eight codes = BITS bytes, so
that positions within it fit 32 bits however long the stream is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from astra_kernels._triton.blocks import read_codes
from astra_kernels._triton.launch import cdiv, launch
from astra_kernels._triton.packed import as_words

BLOCK = 1024  # bytes that a program packs, codes that it unpacks
WARPS = 4


@triton.jit(do_not_specialize=["count", "size"])
def pack_bytes(
    codes, out, count, size,  # [count], [size]
    BITS: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,  # CODES that reach into a byte
):  # fmt: skip
    """A program owns BLOCK bytes; one takes bits from every code that reaches into it."""
    first_byte = tl.program_id(0).to(tl.int64) * BLOCK
    first_code = first_byte * 8 // BITS
    lead = (first_byte * 8 - first_code * BITS).to(tl.int32)
    byte = tl.arange(0, BLOCK)
    bit = byte * 8 + lead  # after the first code's first bit
    value = tl.zeros([BLOCK], tl.uint32)
    for step in tl.static_range(CODES):
        index = bit // BITS + step
        code_mask = (first_code + index < count) & (index * BITS < bit + 8)
        code = tl.load(codes + first_code + index, mask=code_mask, other=0).to(tl.uint32)
        code &= (1 << BITS) - 1
        shift = index * BITS - bit  # in (-BITS, 8) where seen
        left = tl.maximum(shift, 0).to(tl.uint32)
        right = tl.maximum(-shift, 0).to(tl.uint32)
        value |= tl.where(code_mask, code << left >> right, 0)
    tl.store(out + first_byte + byte, value.to(tl.uint8), mask=first_byte + byte < size)


@triton.jit(do_not_specialize=["count", "row_words", "blocks"])
def unpack_codes(
    data, out, count, row_words, blocks,  # [rows, row_words], [rows, count]; programs a row
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK codes of a row; every row starts at a byte."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    code_mask = first + index < count
    stream = data + row * row_words + first // 32 * BITS
    codewords = tl.full((), 1 << BITS, tl.int32)  # any code of so many bits is one
    code = read_codes(stream, index, code_mask, codewords, BITS)
    tl.store(out + row * count + first + index, code, mask=code_mask)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes int32 of any shape -> uint8 [ceil(codes.numel() * bits / 8)]; bits beyond dropped."""
    codes = codes.contiguous()
    count = codes.numel()
    size = (count * bits + 7) // 8
    out = codes.new_empty(size, dtype=torch.uint8)
    launch(
        pack_bytes,
        (cdiv(size, BLOCK),),
        codes,
        out,
        count,
        size,
        device=codes.device,
        warps=WARPS,
        stages=1,
        BITS=bits,
        CODES=(6 + bits) // bits + 1,
        BLOCK=BLOCK,
    )
    return out


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """Data uint8 of at least ceil(count * bits / 8) elements -> int32 [count]."""
    return unpack_rows(data.reshape(1, -1), bits, count)[0]


def unpack_rows(data: Tensor, bits: int, count: int) -> Tensor:
    """Data uint8 [rows, at least ceil(count * bits / 8)] -> int32 [rows, count], in one launch."""
    data = as_words(data, bits)
    rows, row_words = data.shape
    out = data.new_empty((rows, count), dtype=torch.int32)
    blocks = cdiv(count, BLOCK)
    launch(
        unpack_codes,
        (rows * blocks,),
        data,
        out,
        count,
        row_words,
        blocks,
        device=data.device,
        warps=WARPS,
        stages=1,
        BITS=bits,
        BLOCK=BLOCK,
    )
    return out
