"""A linear layer over hidden states that are known by their codes."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._checks import (
    FLOATING,
    check_dtype,
    check_ndim,
    check_tensors,
    fail_value,
    shape_of,
)

__all__ = ["fold_norm", "lookup_linear"]


@overload
def lookup_linear(
    codes: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    estimate: None = ...,
    norm: str | None = ...,
    eps: float = ...,
    code_bits: int | None = ...,
    num_tokens: int | None = ...,
    impl: str = ...,
    check: bool | None = ...,
) -> Tensor: ...


@overload
def lookup_linear(
    codes: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    estimate: Tensor,
    norm: str | None = ...,
    eps: float = ...,
    code_bits: int | None = ...,
    num_tokens: int | None = ...,
    impl: str = ...,
    check: bool | None = ...,
) -> tuple[Tensor, Tensor]: ...


def lookup_linear(
    codes: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    estimate: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
    code_bits: int | None = None,
    num_tokens: int | None = None,
    impl: str = "auto",
    check: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = n(x) W^T + b: the projection of remote tokens by their receiver (ASTRA, arXiv
    2505.19342 section 3), without their hidden states x being written to memory.

    Channels [c*w, (c+1)*w) of x are sum_r codebook[r, c, codes[..., r*C + c]]. With differential
    codes over depth they refine what is known already: x = estimate + the looked-up vector.

    Args:
        codes: int32 (or int64) [..., R*C], values in [0, K), stage by stage; with ``code_bits``
            uint8 [B, ceil(N*R*C*code_bits/8)], each row as ``pack`` writes it, [...] = [B, N].
        codebook: [C, K, w], or [R, C, K, w] for R additive (residual) stages, K up to 65,536.
        weight: [out, D] with D = C*w. bias: [out]. Both with the norm's gain and shift in them,
            see ``fold_norm``.
        estimate: [..., D], the running estimate; it is not changed.
        norm: n(x). None: x; "rms": x / sqrt(mean x^2 + eps); "layer": (x - mean) /
            sqrt(variance + eps), over the D channels.
        code_bits: 1..16, when codes are packed.
        num_tokens: N of packed codes. Otherwise taken from ``estimate``, else from the bytes,
            which is possible when a token takes 8 bits or more.
        impl: "auto", "reference" or "triton"; an explicit choice never falls back.
        check: whether to read and check the values of codes; None: on the CPU only.

    Returns:
        y [..., out] of weight's dtype; with an estimate (y, x), x [..., D] of the estimate's
        dtype, and y is that of x as returned. Floating tensors may be fp32, fp64, fp16 or bf16,
        each its own. Sums are fp32 (fp64 where an input is fp64). Deterministic.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit, a code out of range.
        RuntimeError: an input requires grad, or ``impl`` cannot run here.

    Example:
        >>> codebook, weight = torch.randn(4, 256, 16), torch.randn(96, 64)  # D = 4 * 16
        >>> codes = torch.randint(0, 256, (300, 4), dtype=torch.int32)
        >>> y = ak.lookup_linear(codes, codebook, weight)
        >>> torch.allclose(y, ak.decode(codes, codebook).flatten(1) @ weight.T, atol=1e-4)
        True
    """
    args = (
        *(codes, codebook, weight, bias, estimate, norm, eps, code_bits, num_tokens),
        *(impl, check),
    )
    kept: tuple[Tensor, Tensor] | None = replay.run("lookup_linear", args)
    if kept is not None:
        return kept[0] if estimate is None else kept
    optional = {"bias": bias, "estimate": estimate}
    check_tensors("lookup_linear", optional, codes=codes, codebook=codebook, weight=weight)
    y, x = torch.ops.astra.lookup_linear(*args)
    return y if estimate is None else (y, x)


def fold_norm(
    weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with which (n(x) * gain + shift) W^T + b is n(x) W'^T + b'.

    Args:
        weight: [out, D], fp32, fp64, fp16 or bf16.
        bias: [out], any of these dtypes, or None.
        gain, shift: [D], any of these dtypes: the norm's parameters.

    Returns:
        (weight * gain, bias + weight @ shift), of weight's dtype, computed in fp32 (fp64); the
        bias is None where there is neither bias nor shift.

    Raises:
        TypeError: what is no dense floating-point tensor.
        ValueError: shapes that do not fit.

    Example:
        >>> weight, gain, x = torch.randn(5, 8), torch.rand(8), torch.randn(3, 8)
        >>> folded, bias = ak.fold_norm(weight, None, gain)
        >>> torch.allclose((x * gain) @ weight.T, x @ folded.T, atol=1e-5), bias
        (True, None)
    """
    optional = {"bias": bias, "shift": shift}
    check_tensors("fold_norm", optional, differentiable=True, weight=weight, gain=gain)
    check_dtype("fold_norm", "weight", weight, FLOATING)
    check_ndim("fold_norm", "weight", weight, "out, D")
    sizes = {"out": weight.shape[0], "D": weight.shape[1]}
    for name, tensor, axis in (("bias", bias, "out"), ("gain", gain, "D"), ("shift", shift, "D")):
        if tensor is None:
            continue
        check_dtype("fold_norm", name, tensor, FLOATING)
        if tensor.shape != (sizes[axis],):
            expected = f"[{sizes[axis]}] ({axis} of weight)"
            fail_value("fold_norm", name, expected, shape_of(tensor))
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if shift is not None:
        moved = wide @ shift.to(wide.dtype)
        bias = (moved if bias is None else bias.to(wide.dtype) + moved).to(weight.dtype)
    return (wide * gain.to(wide.dtype)).to(weight.dtype), bias
