"""The coded side of attention: tables, codes packed and not, counts of codewords."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from astra_kernels._checks.arguments import (
    CODES,
    FLOATING,
    MAX_CODE_BITS,
    MAX_CODEWORDS,
    check_device,
    check_dtype,
    check_ndim,
    fail_value,
    shape_of,
)
from astra_kernels._checks.attention import check_heads, check_mask

COUNTS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class TableShape(NamedTuple):
    """Sizes of a codebook ``[R, Hkv, S, K, d/S]`` (R = 1 where the axis is left out)."""

    stages: int
    kv_heads: int
    groups: int
    codewords: int


class CodedInput(NamedTuple):
    """The coded side of a call, as the ops' schemas have it."""

    codes: Tensor
    key_codebook: Tensor
    value_codebook: Tensor
    value_codes: Tensor | None
    code_bits: int | None
    num_tokens: int | None
    cos: Tensor | None
    sin: Tensor | None
    code_mask: Tensor | None
    attn_mask: Tensor | None


class CodedShape(NamedTuple):
    """Sizes of the coded side of a call."""

    tokens: int
    key_codes: int  # C of codes
    value_codes: int  # C of value_codes
    key_codewords: int
    value_codewords: int


def _check_rope(op: str, cos: Tensor, sin: Tensor, batch: int, tokens: int, dim: int) -> None:
    if dim % 2 != 0:
        fail_value(op, "rope", "left out when d is odd (rotate-half pairs channels)", f"d = {dim}")
    for name, tensor in (("rope cos", cos), ("rope sin", sin)):
        check_dtype(op, name, tensor, FLOATING)
        fits = tensor.ndim in (2, 3) and tensor.shape[-2] == tokens and tensor.shape[-1] == dim
        if not fits or (tensor.ndim == 3 and tensor.shape[0] not in (1, batch)):
            expected = f"[{tokens}, {dim}] or [{batch}, {tokens}, {dim}]"
            fail_value(op, name, expected, shape_of(tensor))


def _table_shape(op: str, name: str, table: Tensor, dim: int | None) -> TableShape:
    """``dim``: of keys; None: values, of any width."""
    check_dtype(op, name, table, FLOATING)
    if table.ndim not in (4, 5):
        fail_value(op, name, "[Hkv, S, K, d/S] or [R, Hkv, S, K, d/S]", shape_of(table))
    kv_heads, groups, codewords, width = table.shape[-4:]
    stages = table.shape[0] if table.ndim == 5 else 1
    if dim is None and groups * width < 1:
        fail_value(op, name, "[..., S, K, d_v/S] with d_v >= 1", shape_of(table))
    if dim is not None and groups * width != dim:
        fail_value(op, name, f"[..., S, K, d/S] with S * d/S = {dim}", shape_of(table))
    if not 1 <= codewords <= MAX_CODEWORDS or stages < 1:
        fail_value(op, name, f"of 1 to {MAX_CODEWORDS} codewords K", shape_of(table))
    return TableShape(stages, kv_heads, groups, codewords)


def _count_codes(
    op: str,
    name: str,
    codes: Tensor,
    batch: int,
    tokens: int | None,
    code_bits: int | None,
    table: TableShape,
) -> tuple[int, int]:
    """How many tokens there are, and how many codes each has.

    Own codes per KV head (C = R*Hkv*S) and one set for all heads (C = R*S) are told apart by their
    number; packed rows that fit both are read as the former. A packed row whose number of tokens
    is not known is full; codes of fewer than 8 bits a token leave it open, and are refused.
    """
    shared = table.stages * table.groups
    own = shared * table.kv_heads
    if code_bits is None:
        check_dtype(op, name, codes, CODES)
        check_ndim(op, name, codes, "B, N, C")
        if codes.shape[0] != batch or (tokens is not None and codes.shape[1] != tokens):
            expected = f"[{batch}, {'N' if tokens is None else tokens}, C]"
            fail_value(op, name, expected, shape_of(codes))
        if codes.shape[2] not in (own, shared):
            expected = f"[B, N, C] with C = R*Hkv*S = {own} or C = R*S = {shared}"
            fail_value(op, name, expected, shape_of(codes))
        return codes.shape[1], codes.shape[2]
    return count_packed(op, name, codes, batch, tokens, code_bits, (own, shared))


def count_packed(
    op: str,
    name: str,
    codes: Tensor,
    batch: int,
    tokens: int | None,
    code_bits: int,
    codes_per_token: tuple[int, ...],
) -> tuple[int, int]:
    """How many tokens packed rows hold, and which of ``codes_per_token`` fits them first."""
    check_dtype(op, name, codes, (torch.uint8,))
    if codes.ndim != 2 or codes.shape[0] != batch:
        fail_value(op, name, f"[{batch}, bytes] when code_bits is given", shape_of(codes))
    if not 1 <= code_bits <= MAX_CODE_BITS:
        fail_value(op, "code_bits", f"from 1 to {MAX_CODE_BITS}", code_bits)
    size = codes.shape[1]
    for per_token in codes_per_token:
        token_bits = per_token * code_bits
        if tokens is None and token_bits < 8 and size > 0:
            fail_value(op, "num_tokens", "given when a token takes fewer than 8 bits", None)
        count = size * 8 // token_bits if tokens is None else tokens
        if (count * token_bits + 7) // 8 == size:
            return count, per_token
    choices = " or ".join(str(count) for count in codes_per_token)
    expected = f"[{batch}, ceil(N*C*{code_bits}/8)] with C = {choices}"
    known = "" if tokens is None else f" and N = {tokens}"
    return fail_value(op, name, expected + known, shape_of(codes))


def check_tables(
    op: str, query: Tensor, key_codebook: Tensor, value_codebook: Tensor
) -> TableShape:
    """Tables of keys and values that have the same codes; gives the sizes of both."""
    keys = _table_shape(op, "key_codebook", key_codebook, query.shape[3])
    values = _table_shape(op, "value_codebook", value_codebook, None)
    if values != keys:
        got = shape_of(value_codebook)
        fail_value(op, "value_codebook", "of key_codebook's R, Hkv, S and K", got)
    check_heads(op, query, "key_codebook", keys.kv_heads)
    return keys


def check_coded(op: str, query: Tensor, coded: CodedInput) -> CodedShape:
    """Everything about the coded side; query itself is checked already."""
    batch, dim = query.shape[0], query.shape[3]
    keys = _table_shape(op, "key_codebook", coded.key_codebook, dim)
    values = _table_shape(op, "value_codebook", coded.value_codebook, None)
    if values.kv_heads != keys.kv_heads:
        expected = f"of Hkv = {keys.kv_heads} like key_codebook"
        fail_value(op, "value_codebook", expected, shape_of(coded.value_codebook))
    if coded.value_codes is None and values != keys:
        expected = "of key_codebook's R, S and K (or value_codes given)"
        fail_value(op, "value_codebook", expected, shape_of(coded.value_codebook))
    check_heads(op, query, "key_codebook", keys.kv_heads)

    known = coded.num_tokens
    for tensor, axis in ((coded.code_mask, -1), (coded.cos, -2)):
        if known is None and tensor is not None and tensor.ndim >= 2:
            known = tensor.shape[axis]
    bits = coded.code_bits
    tokens, key_codes = _count_codes(op, "codes", coded.codes, batch, known, bits, keys)
    value_codes = key_codes
    if coded.value_codes is not None:
        _, value_codes = _count_codes(
            op, "value_codes", coded.value_codes, batch, tokens, bits, values
        )
    if coded.code_mask is not None:
        check_mask(op, "code_mask", coded.code_mask, batch, tokens)
    if coded.cos is not None and coded.sin is not None:
        _check_rope(op, coded.cos, coded.sin, batch, tokens, dim)
    for name, given in zip(coded._fields[:-1], coded, strict=False):
        if isinstance(given, Tensor):
            check_device(op, name, given, query.device)
    return CodedShape(tokens, key_codes, value_codes, keys.codewords, values.codewords)


def check_codewords(
    op: str, query: Tensor, counts: Tensor, key_codebook: Tensor, value_codebook: Tensor
) -> None:
    dim = query.shape[3]
    keys = _table_shape(op, "key_codebook", key_codebook, dim)
    if key_codebook.ndim != 4 or keys.groups != 1:
        fail_value(op, "key_codebook", "[Hkv, 1, K, d] (S = 1)", shape_of(key_codebook))
    values = _table_shape(op, "value_codebook", value_codebook, None)
    if value_codebook.ndim != 4 or values != keys:
        expected = f"[{keys.kv_heads}, 1, {keys.codewords}, d_v] (Hkv and K of key_codebook)"
        fail_value(op, "value_codebook", expected, shape_of(value_codebook))
    check_heads(op, query, "key_codebook", keys.kv_heads)
    check_dtype(op, "counts", counts, COUNTS)
    batch, codewords = query.shape[0], keys.codewords
    fits = counts.ndim == 3 and counts.shape[0] == batch and counts.shape[2] == codewords
    if not fits or counts.shape[1] not in (1, keys.kv_heads):
        expected = f"[{batch}, {keys.kv_heads} or 1, {codewords}] (B, Hkv or 1, K)"
        fail_value(op, "counts", expected, shape_of(counts))
    named = (("counts", counts), ("key_codebook", key_codebook), ("value_codebook", value_codebook))
    for name, tensor in named:
        check_device(op, name, tensor, query.device)


def check_code_values(
    op: str, name: str, codes: Tensor, codewords: int, code_mask: Tensor | None = None
) -> None:
    """Reads the codes (a device sync where they are not on the CPU); hidden tokens' are not."""
    if codes.numel() == 0:
        return
    low, high = torch.aminmax(codes)
    if int(low) >= 0 and int(high) < codewords:
        return
    wrong = (codes < 0) | (codes >= codewords)
    if code_mask is not None:
        wrong &= code_mask.unsqueeze(-1)
    for index in wrong.nonzero()[:1].tolist():
        value = int(codes[tuple(index)])
        fail_value(op, name, f"in [0, {codewords}) (K codewords)", f"{value} at index {index}")


def check_counts(op: str, counts: Tensor) -> None:
    """Reads the counts."""
    if counts.numel() == 0 or int(counts.min()) >= 0:
        return
    index = (counts < 0).nonzero()[0].tolist()
    fail_value(op, "counts", "0 or more", f"{int(counts[tuple(index)])} at index {index}")
