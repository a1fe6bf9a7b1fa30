"""Counts of codewords as channels of their keys, for attention that takes no bias.

A key that stands for n equal ones adds n exp(s) = exp(s + ln n), and s + ln n is a product again:
the query gets channels of 1, and the key ln(n) / scale in them, as a sum of three bf16, which
together hold it as fp32 does. A codeword that nobody has gets ``NEVER`` there, and zeros everywhere
else, so that what the tables hold of it does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from astra_kernels._triton.arguments import padded
from astra_kernels._triton.blocks import load_rows
from astra_kernels._triton.launch import cdiv, launch
from astra_kernels._triton.sources import Counted

# Channels that are added: three for the sum, and as many as keep rows of 16 bytes, which cuDNN
# takes in less time than the fewest that it could do with.
ADDED = 16

# Of the score of a codeword that nobody has; finite, as a row of -inf alone would be NaN.
NEVER = -1e30

ROWS = 32  # of queries or codewords in a program
WARPS = 4


@triton.jit(do_not_specialize=["rows", "heads", "codewords", "kv_heads", "query_programs"])
def augment_rows(
    query, query_b, query_h, query_m, out,  # [B, H, M, d]; [B, M, H, d + ADDED]
    counts, counts_b, counts_h, key_table, value_table,  # [B, 1 or Hkv, K]; [Hkv, K, d]
    out_key, out_value,  # [B, Hkv, K, d + ADDED], [B, Hkv, K, d]
    rows, heads, queries, codewords, kv_heads, all_codewords, query_programs,  # B*M*H, H, M, K
    inverse_scale, never,  # ln of 2 over the scale
    HEAD: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program copies ROWS rows of queries, or as many codewords of a batch row and head."""
    channel = tl.arange(0, BLOCK)
    added = tl.arange(0, ADDED)
    if tl.program_id(0) < query_programs:
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = row < rows
        token = row // heads
        source = token // queries * query_b + row % heads * query_h + token % queries * query_m
        vectors = load_rows(query + source, mask, HEAD, BLOCK)
        target = out + row * (HEAD + ADDED)
        inside = mask[:, None] & (channel < HEAD)[None, :]
        tl.store(target[:, None] + channel[None, :], vectors, mask=inside)
        ones = tl.where(added < 3, 1.0, 0.0)[None, :] + tl.zeros([ROWS, ADDED], tl.float32)
        ones = ones.to(out.dtype.element_ty)
        tl.store(target[:, None] + HEAD + added[None, :], ones, mask=mask[:, None])
    else:
        entry = (tl.program_id(0) - query_programs) * ROWS + tl.arange(0, ROWS)
        counted = entry < all_codewords
        pair = entry // codewords
        head = pair % kv_heads
        codeword = entry % codewords
        place = (pair // kv_heads).to(tl.int64) * counts_b + head * counts_h + codeword
        count = tl.load(counts + place, mask=counted, other=0)
        used = count > 0
        bias = tl.log2(tl.maximum(count, 1).to(tl.float32)) * inverse_scale
        bias = tl.where(used, bias, never)
        DTYPE: tl.constexpr = out_key.dtype.element_ty
        first = bias.to(DTYPE)
        rest = tl.where(used, bias - first.to(tl.float32), 0.0)
        second = rest.to(DTYPE)
        third = (rest - second.to(tl.float32)).to(DTYPE)
        keys = load_rows(key_table + (head * codewords + codeword) * HEAD, used, HEAD, BLOCK)
        values = load_rows(value_table + (head * codewords + codeword) * HEAD, used, HEAD, BLOCK)
        key_row = out_key + entry.to(tl.int64) * (HEAD + ADDED)
        within = counted[:, None] & (channel < HEAD)[None, :]
        tl.store(key_row[:, None] + channel[None, :], keys, mask=within)
        terms = tl.where(added[None, :] == 0, first.to(tl.float32)[:, None], 0.0)
        terms += tl.where(added[None, :] == 1, second.to(tl.float32)[:, None], 0.0)
        terms += tl.where(added[None, :] == 2, third.to(tl.float32)[:, None], 0.0)
        tl.store(key_row[:, None] + HEAD + added[None, :], terms.to(DTYPE), mask=counted[:, None])
        value_row = out_value + entry.to(tl.int64) * HEAD
        tl.store(value_row[:, None] + channel[None, :], values, mask=within)


def augment(query: Tensor, counted: Counted, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, M, d + ADDED], stored as [B, M, H, …], keys [B, Hkv, K, d + ADDED] and values
    [B, Hkv, K, d], whose plain attention of that scale is that to codewords with counts.

    All of bf16; the tables are as wide as the queries. ``scale`` is positive.
    """
    batch, heads, rows, dim = query.shape
    counts, key_table, value_table = counted
    kv_heads, codewords = key_table.shape[0], key_table.shape[2]
    counts = counts.contiguous()
    out = query.new_empty((batch, rows, heads, dim + ADDED))
    key = query.new_empty((batch, kv_heads, codewords, dim + ADDED))
    value = query.new_empty((batch, kv_heads, codewords, dim))
    all_rows, all_codewords = batch * rows * heads, batch * kv_heads * codewords
    programs = cdiv(all_rows, ROWS)
    launch(
        augment_rows,
        (programs + cdiv(all_codewords, ROWS),),
        *(query, *query.stride()[:3], out),
        *(counts, counts.stride(0), counts.stride(1) if counts.shape[1] > 1 else 0),
        *(key_table.contiguous(), value_table.contiguous(), key, value),
        *(all_rows, heads, rows, codewords, kv_heads, all_codewords, programs),
        *(0.6931471805599453 / scale, NEVER),
        device=query.device,
        warps=WARPS,
        stages=1,
        HEAD=dim,
        BLOCK=padded(dim),
        ADDED=ADDED,
        ROWS=ROWS,
    )
    return out.transpose(1, 2), key, value
