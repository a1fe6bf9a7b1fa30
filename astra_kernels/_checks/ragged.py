"""Sequences laid end to end, and sequences in pages."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from astra_kernels._checks.arguments import (
    CODES,
    FLOATING,
    MAX_CODE_BITS,
    check_device,
    check_dtype,
    check_ndim,
    fail_value,
    shape_of,
)
from astra_kernels._checks.attention import check_heads


def check_varlen(
    op: str, query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> None:
    check_dtype(op, "query", query, FLOATING)
    check_ndim(op, "query", query, "T, H, d")
    for name, tensor in (("key", key), ("value", value)):
        check_dtype(op, name, tensor, (query.dtype,))
        check_ndim(op, name, tensor, "U, Hkv, d" if name == "key" else "U, Hkv, d_v")
        check_device(op, name, tensor, query.device)
    dim = query.shape[2]
    if key.shape[2] != dim:
        fail_value(op, "key", f"[U, Hkv, {dim}] (d of query)", shape_of(key))
    if value.shape[:2] != key.shape[:2] or (value.shape[2] < 1 and dim > 0):
        expected = f"[{key.shape[0]}, {key.shape[1]}, d_v] with d_v >= 1 (U and Hkv of key)"
        fail_value(op, "value", expected, shape_of(value))
    check_heads(op, query, "key", key.shape[1])
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_dtype(op, name, offsets, CODES)
        if offsets.ndim != 1 or offsets.shape[0] < 1:
            fail_value(op, name, "[B + 1]", shape_of(offsets))
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        expected = f"of cu_seqlens_q's shape {list(cu_seqlens_q.shape)}"
        fail_value(op, "cu_seqlens_k", expected, shape_of(cu_seqlens_k))


def read_offsets(op: str, name: str, offsets: Tensor, tokens: int) -> list[int]:
    """The offsets on the host, which is a sync where they are on a device."""
    values: list[int] = offsets.tolist()
    falls = any(after < before for before, after in pairwise(values))
    if values[0] != 0 or values[-1] != tokens or falls:
        few = values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]
        fail_value(op, name, f"from 0 to {tokens} without falling", few)
    return values


def check_pages(
    op: str,
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    code_bits: int,
    page_tokens: int,
    codes_per_token: tuple[int, ...],
) -> int:
    """Everything but the values; gives C, the first of ``codes_per_token`` that fits."""
    check_dtype(op, "pages", pages, (torch.uint8,))
    check_ndim(op, "pages", pages, "P, bytes")
    if not 1 <= code_bits <= MAX_CODE_BITS:
        fail_value(op, "code_bits", f"from 1 to {MAX_CODE_BITS}", code_bits)
    if page_tokens < 1:
        fail_value(op, "page_tokens", "at least 1", page_tokens)
    check_dtype(op, "block_table", block_table, CODES)
    check_dtype(op, "lengths", lengths, CODES)
    batch = query.shape[0]
    if block_table.ndim != 2 or block_table.shape[0] != batch:
        fail_value(op, "block_table", f"[{batch}, n] (B of query)", shape_of(block_table))
    if lengths.ndim != 1 or lengths.shape[0] != batch:
        fail_value(op, "lengths", f"[{batch}] (B of query)", shape_of(lengths))
    for name, tensor in (("pages", pages), ("block_table", block_table), ("lengths", lengths)):
        check_device(op, name, tensor, query.device)
    for count in codes_per_token:
        if (page_tokens * count * code_bits + 7) // 8 == pages.shape[1]:
            return count
    choices = " or ".join(str(count) for count in codes_per_token)
    expected = f"[P, ceil({page_tokens}*C*{code_bits}/8)] with C = {choices}"
    return fail_value(op, "pages", expected, shape_of(pages))


def check_page_values(
    op: str, pages: Tensor, block_table: Tensor, lengths: Tensor, page_tokens: int
) -> None:
    """Reads the table and the lengths; entries behind a sequence's last page may be anything."""
    most = block_table.shape[1] * page_tokens
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= most:
            fail_value(op, "lengths", f"from 0 to {most}, n * page_tokens", f"{length} at {row}")
        used = block_table[row, : -(-length // page_tokens)]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < pages.shape[0]:
            expected = f"of pages from 0 to {pages.shape[0] - 1} where a sequence has tokens"
            fail_value(op, "block_table", expected, f"{used.tolist()} in row {row}")
