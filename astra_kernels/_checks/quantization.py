"""Vector quantization: encode, decode, and codes that are counted."""

from __future__ import annotations

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
from astra_kernels._checks.attention import check_mask
from astra_kernels._checks.coded import count_packed


def check_encode(op: str, vectors: Tensor, codebook: Tensor, half_norms: Tensor | None) -> None:
    _check_codebook(op, codebook)
    check_dtype(op, "vectors", vectors, FLOATING)
    groups, codewords, width = codebook.shape
    if vectors.ndim < 2 or vectors.shape[-2] != groups or vectors.shape[-1] != width:
        expected = f"[..., {groups}, {width}] (C and w of codebook)"
        fail_value(op, "vectors", expected, shape_of(vectors))
    check_device(op, "codebook", codebook, vectors.device)
    if half_norms is not None:
        check_dtype(op, "half_norms", half_norms, (torch.float32, torch.float64))
        if half_norms.shape != codebook.shape[:2]:
            expected = f"[{groups}, {codewords}] (C, K)"
            fail_value(op, "half_norms", expected, shape_of(half_norms))
        check_device(op, "half_norms", half_norms, vectors.device)


def check_encode_packed(
    vectors: Tensor, codebook: Tensor, code_bits: int, half_norms: Tensor | None
) -> int:
    """Everything about the call; gives the bytes of a batch row."""
    op = "encode_packed"
    check_ndim(op, "vectors", vectors, "B, N, C, w")
    check_encode(op, vectors, codebook, half_norms)
    if not 1 <= code_bits <= MAX_CODE_BITS:
        fail_value(op, "code_bits", f"from 1 to {MAX_CODE_BITS}", code_bits)
    if codebook.shape[1] > 2**code_bits:
        expected = f"of at most {2**code_bits} codewords K (code_bits = {code_bits})"
        fail_value(op, "codebook", expected, shape_of(codebook))
    return (vectors.shape[1] * vectors.shape[2] * code_bits + 7) // 8


def check_decode(codes: Tensor, codebook: Tensor) -> None:
    op = "decode"
    _check_codebook(op, codebook)
    check_dtype(op, "codes", codes, CODES)
    if codes.ndim < 1 or codes.shape[-1] != codebook.shape[0]:
        expected = f"[..., {codebook.shape[0]}] (C of codebook)"
        fail_value(op, "codes", expected, shape_of(codes))
    check_device(op, "codebook", codebook, codes.device)


def _check_codebook(op: str, codebook: Tensor) -> None:
    check_dtype(op, "codebook", codebook, FLOATING)
    check_ndim(op, "codebook", codebook, "C, K, w")
    if not 1 <= codebook.shape[1] <= MAX_CODEWORDS:
        expected = f"of 1 to {MAX_CODEWORDS} codewords K"
        fail_value(op, "codebook", expected, shape_of(codebook))


def check_count_codes(
    codes: Tensor,
    codewords: int,
    code_bits: int | None,
    num_tokens: int | None,
    codes_per_token: int | None,
    code_mask: Tensor | None,
) -> tuple[int, int]:
    """Everything about the call; gives N and C."""
    op, per_token = "count_codes", "codes_per_token"
    if not 1 <= codewords <= MAX_CODEWORDS:
        fail_value(op, "codewords", f"from 1 to {MAX_CODEWORDS}", codewords)
    for name, given, least in (("num_tokens", num_tokens, 0), (per_token, codes_per_token, 1)):
        if given is not None and given < least:
            fail_value(op, name, f"{least} or more", given)
    tokens = num_tokens
    if tokens is None and code_mask is not None and code_mask.ndim == 2:
        tokens = code_mask.shape[1]
    if code_bits is None:
        check_dtype(op, "codes", codes, CODES)
        check_ndim(op, "codes", codes, "B, N, C")
        batch, there, places = codes.shape
        if tokens not in (None, there) or codes_per_token not in (None, places):
            n, c = ("N" if tokens is None else tokens), (codes_per_token or "C")
            fail_value(op, "codes", f"[B, {n}, {c}]", shape_of(codes))
        tokens = there
    else:
        if codes_per_token is None:
            fail_value(op, per_token, "given when codes are packed (code_bits)", None)
        batch, known = codes.shape[0] if codes.ndim > 0 else 0, (codes_per_token,)
        tokens, places = count_packed(op, "codes", codes, batch, tokens, code_bits, known)
    if code_mask is not None:
        check_mask(op, "code_mask", code_mask, batch, tokens)
        check_device(op, "code_mask", code_mask, codes.device)
    return tokens, places
