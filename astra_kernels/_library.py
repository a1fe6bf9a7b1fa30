"""Registration of every op with torch: schema, kernel, fake kernel; one boundary a public call.

A kernel checks its input, unpacks codes where they are packed, and hands over to the implementation
that ``_dispatch`` chooses. The fake kernel makes the same checks of shapes and dtypes and gives the
outputs' shapes, dtypes and strides, which are those of every implementation. ``Library.define`` and
``impl`` cost a third of what ``torch.library.custom_op`` costs per call (6 against 22 µs for seven
arguments under no_grad, CPU time on a 2.4 GHz Zen 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from astra_kernels import _checks as checks
from astra_kernels._checks import CodedInput
from astra_kernels._dispatch import Implementation, choose, packing
from astra_kernels.attention.cpu import new_state
from astra_kernels.lookup_linear import _checks as lookup_linear_checks
from astra_kernels.pack.native import pack_tensor, unpack_tensor

State = tuple[Tensor, Tensor]
T = TypeVar("T")

_library = torch.library.Library("astra", "DEF")


def _register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    tags = (torch.Tag.pt2_compliant_tag,)
    _library.define(schema, tags=tags)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"astra::{name}", fake, lib=_library)


def _wants_check(check: bool | None, tensor: Tensor) -> bool:
    """Reading codes costs a device sync, so it is done unasked on the CPU only."""
    return tensor.device.type == "cpu" if check is None else check


def _split(kind: Callable[..., T], args: tuple[Any, ...]) -> tuple[T, tuple[Any, ...]]:
    """The fields of a NamedTuple, which a schema lists one by one, and the arguments after them."""
    count = len(kind._fields)  # type: ignore[attr-defined]
    return kind(*args[:count]), args[count:]


def _stored_as_query(state: State) -> State:
    """Every implementation's out leaves stored as [B, M, H, d], as the fake kernels promise."""
    out, lse = state
    stored = out.transpose(1, 2)
    return (out if stored.is_contiguous() else stored.contiguous().transpose(1, 2)), lse


# Bit packing


def _pack(codes: Tensor, bits: int) -> Tensor:
    if codes.is_cpu:
        return pack_tensor(codes, bits)
    packed: Tensor = packing(codes.device).pack(codes, bits)
    return packed


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((codes.numel() * bits + 7) // 8, dtype=torch.uint8)


def _unpack(data: Tensor, bits: int, count: int) -> Tensor:
    if data.is_cpu:
        return unpack_tensor(data, bits, count)
    codes: Tensor = packing(data.device).unpack(data, bits, count)
    return codes


def _unpack_fake(data: Tensor, bits: int, count: int) -> Tensor:
    return data.new_empty(count, dtype=torch.int32)


_register("pack(Tensor codes, int bits) -> Tensor", _pack, _pack_fake)
_register("unpack(Tensor data, int bits, SymInt count) -> Tensor", _unpack, _unpack_fake)


# Vector quantization


def _check_encode(vectors: Tensor, codebook: Tensor, half_norms: Tensor | None) -> None:
    checks.check_forward_only("encode", vectors=vectors, codebook=codebook)
    checks.check_encode("encode", vectors, codebook, half_norms)


def _encode(vectors: Tensor, codebook: Tensor, half_norms: Tensor | None, impl: str) -> Tensor:
    _check_encode(vectors, codebook, half_norms)
    dtype = torch.promote_types(vectors.dtype, codebook.dtype)
    codes: Tensor = choose("encode", impl, vectors.device, dtype).run(vectors, codebook, half_norms)
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
    kernel = choose("encode_packed", impl, vectors.device, dtype)
    packed: Tensor = kernel.run(vectors, codebook, code_bits, half_norms)
    return packed


def _encode_packed_fake(
    vectors: Tensor, codebook: Tensor, code_bits: int, half_norms: Tensor | None, impl: str
) -> Tensor:
    size = _check_encode_packed(vectors, codebook, code_bits, half_norms)
    return vectors.new_empty((vectors.shape[0], size), dtype=torch.uint8)


def _decode(codes: Tensor, codebook: Tensor, impl: str, check: bool | None) -> Tensor:
    checks.check_forward_only("decode", codebook=codebook)
    checks.check_decode(codes, codebook)
    if _wants_check(check, codes):
        checks.check_code_values("decode", "codes", codes, codebook.shape[1])
    vectors: Tensor = choose("decode", impl, codes.device, codebook.dtype).run(codes, codebook)
    return vectors


def _decode_fake(codes: Tensor, codebook: Tensor, impl: str, check: bool | None) -> Tensor:
    checks.check_forward_only("decode", codebook=codebook)
    checks.check_decode(codes, codebook)
    return codebook.new_empty((*codes.shape, codebook.shape[2]))


_register(
    "encode(Tensor vectors, Tensor codebook, Tensor? half_norms, str impl) -> Tensor",
    _encode,
    _encode_fake,
)
_register(
    "encode_packed(Tensor vectors, Tensor codebook, int code_bits, Tensor? half_norms, str impl) "
    "-> Tensor",
    _encode_packed,
    _encode_packed_fake,
)
_register(
    "decode(Tensor codes, Tensor codebook, str impl, bool? check) -> Tensor",
    _decode,
    _decode_fake,
)


# Attention


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, key_mask: Tensor | None
) -> None:
    checks.check_forward_only("attention", query=query, key=key, value=value)
    checks.check_query("attention", query)
    checks.check_dense("attention", query, key, value, is_causal, key_mask)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_mask: Tensor | None,
    scale: float | None,
    impl: str,
) -> State:
    _check_attention(query, key, value, is_causal, key_mask)
    kernel = choose("attention", impl, query.device, query.dtype)
    return _stored_as_query(
        kernel.run(query, key, value, is_causal=is_causal, key_mask=key_mask, scale=scale)
    )


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_mask: Tensor | None,
    scale: float | None,
    impl: str,
) -> State:
    _check_attention(query, key, value, is_causal, key_mask)
    return new_state(query)


_register(
    "attention(Tensor query, Tensor key, Tensor value, bool is_causal, Tensor? key_mask, "
    "float? scale, str impl) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)


def _unpack_rows(codes: Tensor, code_bits: int, tokens: int, codes_per_token: int) -> Tensor:
    """uint8 [B, bytes] -> int32 [B, N, C]; every row starts at a byte."""
    count = tokens * codes_per_token
    if not codes.is_cpu:
        rows = packing(codes.device).unpack_rows(codes, code_bits, count)
    elif codes.shape[0] == 1:
        rows = unpack_tensor(codes[0], code_bits, count)
    else:
        rows = codes.new_empty((codes.shape[0], count), dtype=torch.int32)
        for row, packed in zip(rows, codes, strict=True):
            row.copy_(unpack_tensor(packed, code_bits, count))
    return rows.view(codes.shape[0], tokens, codes_per_token)


def _check_coded(op: str, query: Tensor, coded: CodedInput) -> checks.CodedShape:
    checks.check_forward_only(
        op,
        query=query,
        key_codebook=coded.key_codebook,
        value_codebook=coded.value_codebook,
        cos=coded.cos,
        sin=coded.sin,
    )
    checks.check_query(op, query)
    return checks.check_coded(op, query, coded)


def _coded_arguments(
    op: str,
    kernel: Implementation,
    coded: CodedInput,
    shape: checks.CodedShape,
    scale: float | None,
    check: bool | None,
) -> dict[str, Any]:
    """What the implementation takes; values of codes are checked if they are to be."""
    codes, value_codes, mask = coded.codes, coded.value_codes, coded.code_mask
    checked = _wants_check(check, codes)
    packed = coded.code_bits is not None and kernel.extended
    if coded.code_bits is not None and (checked or not packed):
        bits, tokens = coded.code_bits, shape.tokens
        codes = _unpack_rows(codes, bits, tokens, shape.key_codes)
        if value_codes is not None:
            value_codes = _unpack_rows(value_codes, bits, tokens, shape.value_codes)
    if checked:
        checks.check_code_values(op, "codes", codes, shape.key_codewords, mask)
        if value_codes is not None:
            checks.check_code_values(op, "value_codes", value_codes, shape.value_codewords, mask)
    arguments: dict[str, Any] = {
        "codes": codes,
        "key_codebook": coded.key_codebook,
        "value_codebook": coded.value_codebook,
        "value_codes": value_codes,
        "scale": scale,
        "rope": None if coded.cos is None else (coded.cos, coded.sin),
        "code_mask": mask,
    }
    if packed:
        arguments |= {"codes": coded.codes, "value_codes": coded.value_codes}
        arguments |= {"code_bits": coded.code_bits, "shape": shape}
    if kernel.extended:
        arguments["rope_consecutive"] = coded.consecutive
    return arguments


_CODED = (
    "Tensor codes, Tensor key_codebook, Tensor value_codebook, Tensor? value_codes, "
    "int? code_bits, SymInt? num_tokens, Tensor? cos, Tensor? sin, bool consecutive, "
    "Tensor? code_mask"
)


def _coded_attention(query: Tensor, *args: Any) -> State:
    op = "coded_attention"
    coded, (scale, impl, check) = _split(CodedInput, args)
    shape = _check_coded(op, query, coded)
    kernel = choose(op, impl, query.device, query.dtype)
    return _stored_as_query(
        kernel.run(query, **_coded_arguments(op, kernel, coded, shape, scale, check))
    )


def _coded_attention_fake(query: Tensor, *args: Any) -> State:
    _check_coded("coded_attention", query, _split(CodedInput, args)[0])
    return new_state(query)


_register(
    f"coded_attention(Tensor query, {_CODED}, float? scale, str impl, bool? check) "
    "-> (Tensor, Tensor)",
    _coded_attention,
    _coded_attention_fake,
)


def _check_mixed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_mask: Tensor | None,
    coded: CodedInput,
) -> checks.CodedShape:
    op = "mixed_attention"
    checks.check_forward_only(op, key=key, value=value)
    shape = _check_coded(op, query, coded)
    checks.check_dense(op, query, key, value, is_causal, key_mask)
    if coded.key_codebook.shape[-4] != key.shape[1]:
        got = checks.shape_of(coded.key_codebook)
        checks.fail_value(op, "key_codebook", f"of key's Hkv = {key.shape[1]}", got)
    return shape


def _mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_mask: Tensor | None,
    *args: Any,
) -> State:
    op = "mixed_attention"
    coded, (scale, impl, check) = _split(CodedInput, args)
    shape = _check_mixed(query, key, value, is_causal, key_mask, coded)
    kernel = choose(op, impl, query.device, query.dtype)
    arguments = _coded_arguments(op, kernel, coded, shape, scale, check)
    return _stored_as_query(
        kernel.run(query, key, value, is_causal=is_causal, key_mask=key_mask, **arguments)
    )


def _mixed_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_mask: Tensor | None,
    *args: Any,
) -> State:
    _check_mixed(query, key, value, is_causal, key_mask, _split(CodedInput, args)[0])
    return new_state(query)


_register(
    "mixed_attention(Tensor query, Tensor key, Tensor value, bool is_causal, Tensor? key_mask, "
    f"{_CODED}, float? scale, str impl, bool? check) -> (Tensor, Tensor)",
    _mixed_attention,
    _mixed_attention_fake,
)


def _check_codeword_attention(
    query: Tensor, counts: Tensor, key_codebook: Tensor, value_codebook: Tensor
) -> None:
    op = "codeword_attention"
    checks.check_forward_only(
        op, query=query, key_codebook=key_codebook, value_codebook=value_codebook
    )
    checks.check_query(op, query)
    checks.check_codewords(op, query, counts, key_codebook, value_codebook)


def _codeword_attention(
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    scale: float | None,
    impl: str,
    check: bool | None,
) -> State:
    op = "codeword_attention"
    _check_codeword_attention(query, counts, key_codebook, value_codebook)
    if _wants_check(check, counts):
        checks.check_counts(op, counts)
    kernel = choose(op, impl, query.device, query.dtype)
    return _stored_as_query(kernel.run(query, counts, key_codebook, value_codebook, scale=scale))


def _codeword_attention_fake(
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    scale: float | None,
    impl: str,
    check: bool | None,
) -> State:
    _check_codeword_attention(query, counts, key_codebook, value_codebook)
    return new_state(query)


_register(
    "codeword_attention(Tensor query, Tensor counts, Tensor key_codebook, Tensor value_codebook, "
    "float? scale, str impl, bool? check) -> (Tensor, Tensor)",
    _codeword_attention,
    _codeword_attention_fake,
)


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
    kernel = choose(op, impl, codes.device, torch.int32)
    checked = _wants_check(check, codes)
    packed = code_bits is not None and kernel.extended
    integers = codes
    if code_bits is not None and (checked or not packed):
        integers = _unpack_rows(codes, code_bits, *shape)
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


_register(
    "count_codes(Tensor codes, SymInt codewords, int? code_bits, SymInt? num_tokens, "
    "SymInt? codes_per_token, Tensor? code_mask, str impl, bool? check) -> Tensor",
    _count_codes,
    _count_codes_fake,
)


def _check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    op = "merge_state"
    checks.check_forward_only(op, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    checks.check_merge(op, out_a, lse_a, out_b, lse_b)


def _merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, impl: str) -> State:
    _check_merge(out_a, lse_a, out_b, lse_b)
    dtype = torch.promote_types(out_a.dtype, lse_a.dtype)
    out, lse = choose("merge_state", impl, out_a.device, dtype).run(out_a, lse_a, out_b, lse_b)
    stored = torch.empty_like(out_a)
    return (out if out.stride() == stored.stride() else stored.copy_(out)), lse


def _merge_state_fake(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, impl: str
) -> State:
    _check_merge(out_a, lse_a, out_b, lse_b)
    return torch.empty_like(out_a), torch.empty_like(lse_a, memory_format=torch.contiguous_format)


_register(
    "merge_state(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str impl) "
    "-> (Tensor, Tensor)",
    _merge_state,
    _merge_state_fake,
)


# Linear layers over codes


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
    given, (impl, check) = _split(lookup_linear_checks.Input, args)
    lead = _check_lookup_linear(given)
    kernel = choose(op, impl, given.codes.device, lookup_linear_checks.widest(given))
    codes, bits = given.codes, given.code_bits
    checked = _wants_check(check, codes)
    packed = bits is not None and kernel.extended
    if bits is not None and (checked or not packed):
        codes = _unpack_rows(codes, bits, lead[1], lookup_linear_checks.codes_per_token(given))
    if checked:
        checks.check_code_values(op, "codes", codes, given.codebook.shape[-2])
    options: dict[str, Any] = {"estimate": given.estimate, "norm": given.norm, "eps": given.eps}
    if packed:
        codes = given.codes
        options |= {"code_bits": bits, "num_tokens": lead[1]}
    y, x = kernel.run(codes, given.codebook, given.weight, given.bias, **options)
    return y.contiguous(), y.new_empty(0) if x is None else x.contiguous()


def _lookup_linear_fake(*args: Any) -> State:
    given, _ = _split(lookup_linear_checks.Input, args)
    lead = _check_lookup_linear(given)
    y = given.weight.new_empty((*lead, given.weight.shape[0]))
    x = given.estimate
    return y, y.new_empty(0) if x is None else x.new_empty(x.shape)


_register(
    "lookup_linear(Tensor codes, Tensor codebook, Tensor weight, Tensor? bias, Tensor? estimate, "
    "str? norm, float eps, int? code_bits, SymInt? num_tokens, str impl, bool? check) "
    "-> (Tensor, Tensor)",
    _lookup_linear,
    _lookup_linear_fake,
)
