"""What `lookup_linear` takes, said once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from astra_kernels._checks import (
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

OP = "lookup_linear"
NORMS = (None, "rms", "layer")


class Input(NamedTuple):
    """A call, as the op's schema has it, but for ``impl`` and ``check``."""

    codes: Tensor
    codebook: Tensor
    weight: Tensor
    bias: Tensor | None
    estimate: Tensor | None
    norm: str | None
    eps: float
    code_bits: int | None
    num_tokens: int | None


def codes_per_token(given: Input) -> int:
    """R*C"""
    stages, groups = (1, *given.codebook.shape)[-4:-2]
    return stages * groups


def widest(given: Input) -> torch.dtype:
    """fp64 where an input is, else weight's dtype: what an implementation is chosen by."""
    tensors = (given.codebook, given.weight, given.bias, given.estimate)
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else given.weight.dtype


def check(given: Input) -> tuple[int, ...]:
    """The leading axes: [...] of codes, or (B, N) of packed ones."""
    _check_codebook(given.codebook)
    groups, _, width = given.codebook.shape[-3:]
    lead = _lead(given, codes_per_token(given))
    _check_weight(given.weight, given.bias, groups * width)
    if given.estimate is not None:
        check_dtype(OP, "estimate", given.estimate, FLOATING)
        expected = (*lead, groups * width)
        if given.estimate.shape != expected:
            expected_shape = f"{list(expected)} (tokens of codes, D of codebook)"
            fail_value(OP, "estimate", expected_shape, shape_of(given.estimate))
    if given.norm not in NORMS:
        fail_value(OP, "norm", "None, 'rms' or 'layer'", repr(given.norm))
    for name in ("codebook", "weight", "bias", "estimate"):
        tensor = getattr(given, name)
        if tensor is not None:
            check_device(OP, name, tensor, given.codes.device)
    return lead


def _check_codebook(codebook: Tensor) -> None:
    check_dtype(OP, "codebook", codebook, FLOATING)
    if codebook.ndim not in (3, 4):
        fail_value(OP, "codebook", "[C, K, w] or [R, C, K, w]", shape_of(codebook))
    groups, codewords, width = codebook.shape[-3:]
    stages = codebook.shape[0] if codebook.ndim == 4 else 1
    if min(stages, groups, width) < 1:
        fail_value(OP, "codebook", "of at least one stage, group and channel", shape_of(codebook))
    if not 1 <= codewords <= MAX_CODEWORDS:
        fail_value(OP, "codebook", f"of 1 to {MAX_CODEWORDS} codewords K", shape_of(codebook))


def _check_weight(weight: Tensor, bias: Tensor | None, channels: int) -> None:
    check_dtype(OP, "weight", weight, FLOATING)
    if weight.ndim != 2 or weight.shape[1] != channels:
        fail_value(OP, "weight", f"[out, {channels}] (D = C*w of codebook)", shape_of(weight))
    if bias is not None:
        check_dtype(OP, "bias", bias, FLOATING)
        if bias.shape != weight.shape[:1]:
            fail_value(OP, "bias", f"[{weight.shape[0]}] (out of weight)", shape_of(bias))


def _lead(given: Input, per_token: int) -> tuple[int, ...]:
    codes, tokens = given.codes, given.num_tokens
    if given.code_bits is not None:
        return _packed_lead(given, per_token)
    check_dtype(OP, "codes", codes, CODES)
    if codes.ndim < 1 or codes.shape[-1] != per_token:
        fail_value(OP, "codes", f"[..., {per_token}] (R*C of codebook)", shape_of(codes))
    if tokens is not None:
        fail_value(OP, "num_tokens", "left out when codes are not packed", tokens)
    return tuple(codes.shape[:-1])


def _packed_lead(given: Input, per_token: int) -> tuple[int, int]:
    codes, bits, tokens = given.codes, given.code_bits, given.num_tokens
    assert bits is not None
    check_dtype(OP, "codes", codes, (torch.uint8,))
    check_ndim(OP, "codes", codes, "B, bytes")
    if not 1 <= bits <= MAX_CODE_BITS:
        fail_value(OP, "code_bits", f"from 1 to {MAX_CODE_BITS}", bits)
    if tokens is None and given.estimate is not None and given.estimate.ndim == 3:
        tokens = given.estimate.shape[1]
    batch, size = codes.shape
    if tokens is None:
        if per_token * bits < 8 and size > 0:
            fail_value(OP, "num_tokens", "given when a token takes fewer than 8 bits", None)
        tokens = size * 8 // (per_token * bits)
    if (tokens * per_token * bits + 7) // 8 != size:
        expected = f"[B, ceil(N*{per_token}*{bits}/8)] with N = {tokens}"
        fail_value(OP, "codes", expected, shape_of(codes))
    return batch, tokens
