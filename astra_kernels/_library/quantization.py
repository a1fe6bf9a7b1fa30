"""Vector quantization: encode, decode, count_codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from astra_kernels import _checks as checks
from astra_kernels import _dispatch
from astra_kernels._library.gradients import register_autograd, register_once_differentiable
from astra_kernels._library.packing import unpack_rows
from astra_kernels._library.registration import register, wants_check
from astra_kernels.decode.gradient import decode as decode_gradient


def _check_encode(vectors: Tensor, codebook: Tensor, half_norms: Tensor | None) -> None:
    checks.check_forward_only("encode", vectors=vectors, codebook=codebook)
    checks.check_encode("encode", vectors, codebook, half_norms)


def _encode(vectors: Tensor, codebook: Tensor, half_norms: Tensor | None, impl: str) -> Tensor:
    _check_encode(vectors, codebook, half_norms)
    dtype = torch.promote_types(vectors.dtype, codebook.dtype)
    codes: Tensor = _dispatch.choose("encode", impl, vectors.device, dtype).run(
        vectors, codebook, half_norms
    )
    return codes


def _encode_fake(vectors: Tensor, codebook: Tensor, half_norms: Tensor | None, impl: str) -> Tensor:
    _check_encode(vectors, codebook, half_norms)
    return vectors.new_empty(vectors.shape[:-1], dtype=torch.int32)


def _check_encode_packed(
    vectors: Tensor, codebook: Tensor, code_bits: int, half_norms: Tensor | None
) -> int:
    checks.check_forward_only("encode_packed", vectors=vectors, codebook=codebook)
    return checks.check_encode_packed(vectors, codebook, code_bits, half_norms)


def _encode_packed(
    vectors: Tensor, codebook: Tensor, code_bits: int, half_norms: Tensor | None, impl: str
) -> Tensor:
    _check_encode_packed(vectors, codebook, code_bits, half_norms)
    dtype = torch.promote_types(vectors.dtype, codebook.dtype)
    kernel = _dispatch.choose("encode_packed", impl, vectors.device, dtype)
    packed: Tensor = kernel.run(vectors, codebook, code_bits, half_norms)
    return packed


def _encode_packed_fake(
    vectors: Tensor, codebook: Tensor, code_bits: int, half_norms: Tensor | None, impl: str
) -> Tensor:
    size = _check_encode_packed(vectors, codebook, code_bits, half_norms)
    return vectors.new_empty((vectors.shape[0], size), dtype=torch.uint8)


register(
    "encode(Tensor vectors, Tensor codebook, Tensor? half_norms, str impl) -> Tensor",
    _encode,
    _encode_fake,
    replayed=True,
)
register(
    "encode_packed(Tensor vectors, Tensor codebook, int code_bits, Tensor? half_norms, str impl) "
    "-> Tensor",
    _encode_packed,
    _encode_packed_fake,
    replayed=True,
)


def _decode(codes: Tensor, codebook: Tensor, impl: str, check: bool | None) -> Tensor:
    checks.check_decode(codes, codebook)
    if wants_check(check, codes):
        checks.check_code_values("decode", "codes", codes, codebook.shape[1])
    vectors: Tensor = _dispatch.choose("decode", impl, codes.device, codebook.dtype).run(
        codes, codebook
    )
    return vectors


def _decode_fake(codes: Tensor, codebook: Tensor, impl: str, check: bool | None) -> Tensor:
    checks.check_decode(codes, codebook)
    return codebook.new_empty((*codes.shape, codebook.shape[2]))


register(
    "decode(Tensor codes, Tensor codebook, str impl, bool? check) -> Tensor",
    _decode,
    _decode_fake,
    replayed=True,
)


def _decode_backward(grad: Tensor, codes: Tensor, codewords: int) -> Tensor:
    return decode_gradient(grad, codes, codewords).to(grad.dtype)


def _decode_backward_fake(grad: Tensor, codes: Tensor, codewords: int) -> Tensor:
    groups, width = grad.shape[-2:]
    return grad.new_empty((groups, codewords, width))


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The codebook may change meanwhile, as in training by moving averages."""
    codes, codebook, *_ = inputs
    ctx.save_for_backward(codes)
    ctx.codewords = codebook.shape[1]


def _backward_of_decode(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    return None, torch.ops.astra.decode_backward(grad, codes, ctx.codewords), None, None


register(
    "decode_backward(Tensor grad, Tensor codes, SymInt codewords) -> Tensor",
    _decode_backward,
    _decode_backward_fake,
)
register_autograd("decode", _backward_of_decode, _save_decode)
register_once_differentiable("decode")


def _count_codes(
    codes: Tensor,
    codewords: int,
    code_bits: int | None,
    num_tokens: int | None,
    codes_per_token: int | None,
    code_mask: Tensor | None,
    impl: str,
    check: bool | None,
) -> Tensor:
    op = "count_codes"
    shape = checks.check_count_codes(
        codes, codewords, code_bits, num_tokens, codes_per_token, code_mask
    )
    kernel = _dispatch.choose(op, impl, codes.device, torch.int32)
    checked = wants_check(check, codes)
    packed = code_bits is not None and kernel.extended
    integers = codes
    if code_bits is not None and (checked or not packed):
        integers = unpack_rows(codes, code_bits, *shape)
    if checked:
        checks.check_code_values(op, "codes", integers, codewords, code_mask)
    options: dict[str, int | None] = {}
    if packed:
        integers = codes
        options = {"code_bits": code_bits, "num_tokens": shape[0], "codes_per_token": shape[1]}
    counts: Tensor = kernel.run(integers, codewords, code_mask=code_mask, **options)
    return counts


def _count_codes_fake(
    codes: Tensor,
    codewords: int,
    code_bits: int | None,
    num_tokens: int | None,
    codes_per_token: int | None,
    code_mask: Tensor | None,
    impl: str,
    check: bool | None,
) -> Tensor:
    _, places = checks.check_count_codes(
        codes, codewords, code_bits, num_tokens, codes_per_token, code_mask
    )
    return codes.new_empty((codes.shape[0], places, codewords), dtype=torch.int32)


register(
    "count_codes(Tensor codes, SymInt codewords, int? code_bits, SymInt? num_tokens, "
    "SymInt? codes_per_token, Tensor? code_mask, str impl, bool? check) -> Tensor",
    _count_codes,
    _count_codes_fake,
    replayed=True,
)
