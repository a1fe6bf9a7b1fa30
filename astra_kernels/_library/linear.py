"""Linear layers over codes, and of integer weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from astra_kernels import _checks as checks
from astra_kernels import _dispatch
from astra_kernels._library.packing import unpack_rows
from astra_kernels._library.registration import State, register, split, wants_check
from astra_kernels.lookup_linear import _checks as lookup_linear_checks
from astra_kernels.quantized_linear._checks import check_quantized_linear


def _check_lookup_linear(given: lookup_linear_checks.Input) -> tuple[int, ...]:
    checks.check_forward_only(
        "lookup_linear",
        codebook=given.codebook,
        weight=given.weight,
        bias=given.bias,
        estimate=given.estimate,
    )
    return lookup_linear_checks.check(given)


def _lookup_linear(*args: Any) -> State:
    op = "lookup_linear"
    given, (impl, check) = split(lookup_linear_checks.Input, args)
    lead = _check_lookup_linear(given)
    kernel = _dispatch.choose(op, impl, given.codes.device, lookup_linear_checks.widest(given))
    codes, bits = given.codes, given.code_bits
    checked = wants_check(check, codes)
    packed = bits is not None and kernel.extended
    if bits is not None and (checked or not packed):
        codes = unpack_rows(codes, bits, lead[1], lookup_linear_checks.codes_per_token(given))
    if checked:
        checks.check_code_values(op, "codes", codes, given.codebook.shape[-2])
    options: dict[str, Any] = {"estimate": given.estimate, "norm": given.norm, "eps": given.eps}
    if packed:
        codes = given.codes
        options |= {"code_bits": bits, "num_tokens": lead[1]}
    y, x = kernel.run(codes, given.codebook, given.weight, given.bias, **options)
    return y.contiguous(), y.new_empty(0) if x is None else x.contiguous()


def _lookup_linear_fake(*args: Any) -> State:
    given, _ = split(lookup_linear_checks.Input, args)
    lead = _check_lookup_linear(given)
    y = given.weight.new_empty((*lead, given.weight.shape[0]))
    x = given.estimate
    return y, y.new_empty(0) if x is None else x.new_empty(x.shape)


register(
    "lookup_linear(Tensor codes, Tensor codebook, Tensor weight, Tensor? bias, Tensor? estimate, "
    "str? norm, float eps, int? code_bits, SymInt? num_tokens, str impl, bool? check) "
    "-> (Tensor, Tensor)",
    _lookup_linear,
    _lookup_linear_fake,
    replayed=True,
)


def _quantized_linear(
    vectors: Tensor,
    weight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    impl: str,
) -> Tensor:
    check_quantized_linear(vectors, weight, scale, minimum, bias)
    kernel = _dispatch.choose("quantized_linear", impl, vectors.device, vectors.dtype)
    out: Tensor = kernel.run(vectors, weight, scale, minimum, bias)
    return out


def _quantized_linear_fake(
    vectors: Tensor,
    weight: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    impl: str,
) -> Tensor:
    check_quantized_linear(vectors, weight, scale, minimum, bias)
    return vectors.new_empty((*vectors.shape[:-1], weight.shape[0]))


register(
    "quantized_linear(Tensor vectors, Tensor weight, Tensor scale, Tensor? minimum, Tensor? bias, "
    "str impl) -> Tensor",
    _quantized_linear,
    _quantized_linear_fake,
)
