"""Attention over codes, alone and beside dense tokens, and over codewords with counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from astra_kernels import _checks as checks
from astra_kernels import _dispatch
from astra_kernels._checks import CodedInput
from astra_kernels._dispatch import VALUE_WIDTH, Implementation
from astra_kernels._library.attention import (
    DENSE,
    SCORES,
    check_attention,
    given,
    new_state,
    stored_as_query,
    uses_of_dense,
)
from astra_kernels._library.gradients import States, register_gradient
from astra_kernels._library.packing import unpack_rows
from astra_kernels._library.registration import State, register, split, wants_check
from astra_kernels.coded_attention.cpu import looks_up

CODED = (
    "Tensor codes, Tensor key_codebook, Tensor value_codebook, Tensor? value_codes, "
    "int? code_bits, SymInt? num_tokens, Tensor? cos, Tensor? sin, "
    "Tensor? code_mask"
)


class Dense(NamedTuple):
    """The dense side of a call, as the ops' schemas have it."""

    key: Tensor
    value: Tensor
    is_causal: bool
    key_mask: Tensor | None
    attn_mask: Tensor | None
    window: Sequence[int] | None


class Rest(NamedTuple):
    """What is done with scores, and by which implementation."""

    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    impl: str
    check: bool | None


def value_width(value_codebook: Tensor) -> int:
    """d_v: the width of the vectors that S sub-vectors of the table make."""
    groups, _, width = value_codebook.shape[-3:]
    return groups * width


def check_scored_codes(
    op: str, query: Tensor, coded: CodedInput, rest: Rest, mask_name: str = "attn_mask"
) -> checks.CodedShape:
    checks.check_query(op, query)
    shape = checks.check_coded(op, query, coded)
    if coded.attn_mask is not None:
        checks.check_attn_mask(op, mask_name, coded.attn_mask, query, shape.tokens)
    checks.check_scores(op, query, rest.softcap, rest.sinks)
    return shape


def _uses_of_codes(query: Tensor, coded: CodedInput) -> tuple[str, ...]:
    wide = value_width(coded.value_codebook) != query.shape[3]
    return (VALUE_WIDTH,) if wide else ()


def _choose(
    op: str,
    query: Tensor,
    coded: CodedInput,
    shape: checks.CodedShape,
    impl: str,
    uses: Sequence[str],
) -> Implementation:
    """`auto` on a CPU takes the C++ kernel here where it serves: this one reads packed codes where
    they lie, and checks them as it goes."""
    if impl == "auto" and query.device.type == "cpu" and _dispatch.native_takes(op, uses):
        sizes = (shape.tokens, shape.key_codes)
        rope = None if coded.cos is None or coded.sin is None else (coded.cos, coded.sin)
        if looks_up(query, sizes, coded.key_codebook, rope, coded.value_codes):
            impl = "native"
    return _dispatch.choose(op, impl, query.device, query.dtype, uses)


def _coded_arguments(
    op: str,
    kernel: Implementation,
    coded: CodedInput,
    shape: checks.CodedShape,
    rest: Rest,
) -> dict[str, Any]:
    """What the implementation takes; values of codes are checked if they are to be."""
    codes, value_codes, mask = coded.codes, coded.value_codes, coded.code_mask
    checked = wants_check(rest.check, codes) and not kernel.checks_codes
    packed = coded.code_bits is not None and kernel.extended
    if coded.code_bits is not None and (checked or not packed):
        bits, tokens = coded.code_bits, shape.tokens
        codes = unpack_rows(codes, bits, tokens, shape.key_codes)
        if value_codes is not None:
            value_codes = unpack_rows(value_codes, bits, tokens, shape.value_codes)
    if checked:
        checks.check_code_values(op, "codes", codes, shape.key_codewords, mask)
        if value_codes is not None:
            checks.check_code_values(op, "value_codes", value_codes, shape.value_codewords, mask)
    arguments: dict[str, Any] = {
        "codes": codes,
        "key_codebook": coded.key_codebook,
        "value_codebook": coded.value_codebook,
        "value_codes": value_codes,
        "scale": rest.scale,
        "rope": None if coded.cos is None else (coded.cos, coded.sin),
        "code_mask": mask,
    }
    if packed:
        arguments |= {"codes": coded.codes, "value_codes": coded.value_codes}
        arguments |= {"code_bits": coded.code_bits, "shape": shape}
    return arguments


def _coded_attention(query: Tensor, *args: Any) -> State:
    op = "coded_attention"
    coded, args = split(CodedInput, args)
    rest = Rest(*args)
    shape = check_scored_codes(op, query, coded, rest)
    more = given(attn_mask=coded.attn_mask, softcap=rest.softcap, sinks=rest.sinks)
    uses = (*more, *_uses_of_codes(query, coded))
    kernel = _choose(op, query, coded, shape, rest.impl, uses)
    arguments = _coded_arguments(op, kernel, coded, shape, rest)
    return stored_as_query(kernel.run(query, **arguments, **more))


def _coded_attention_fake(query: Tensor, *args: Any) -> State:
    coded, args = split(CodedInput, args)
    check_scored_codes("coded_attention", query, coded, Rest(*args))
    return new_state(query, value_width(coded.value_codebook))


_CODED_ATTENTION = (
    f"coded_attention(Tensor query, {CODED}, Tensor? attn_mask, {SCORES}, str impl, bool? check) "
    "-> (Tensor, Tensor)"
)
register(_CODED_ATTENTION, _coded_attention, _coded_attention_fake, replayed=True)


def _gradient_arguments(op: str, query: Tensor, coded: CodedInput, rest: Rest) -> dict[str, Any]:
    """What the gradient takes of the coded side: codes are integers, and were checked before."""
    shape = checks.check_coded(op, query, coded)
    plain = _dispatch.Implementation(_dispatch.choose_gradient(op, rest.impl))
    return _coded_arguments(op, plain, coded, shape, rest._replace(check=False))


def coded_gradient(
    states: States, wanted: frozenset[str], query: Tensor, *args: Any
) -> Mapping[str, Tensor]:
    op = "coded_attention"
    coded, args = split(CodedInput, args)
    rest = Rest(*args)
    more = given(attn_mask=coded.attn_mask, softcap=rest.softcap, sinks=rest.sinks)
    arguments = _gradient_arguments(op, query, coded, rest)
    gradient = _dispatch.choose_gradient(op, rest.impl)
    return gradient(*states, query, **arguments, **more, wanted=wanted)


register_gradient(
    _CODED_ATTENTION,
    coded_gradient,
    to=("query", "key_codebook", "value_codebook", "attn_mask", "sinks"),
)


def _check_mixed(query: Tensor, dense: Dense, coded: CodedInput, rest: Rest) -> checks.CodedShape:
    op = "mixed_attention"
    key, value = dense.key, dense.value
    shape = check_scored_codes(op, query, coded, rest, "code_attn_mask")
    check_attention(op, query, key, value, dense.key_mask, dense.attn_mask, dense.window)
    if coded.key_codebook.shape[-4] != key.shape[1]:
        got = checks.shape_of(coded.key_codebook)
        checks.fail_value(op, "key_codebook", f"of key's Hkv = {key.shape[1]}", got)
    if value_width(coded.value_codebook) != value.shape[3]:
        got = checks.shape_of(coded.value_codebook)
        checks.fail_value(op, "value_codebook", f"of value's d_v = {value.shape[3]}", got)
    return shape


def _more_of_mixed(dense: Dense, coded: CodedInput, rest: Rest) -> dict[str, Any]:
    return given(
        attn_mask=dense.attn_mask,
        window=dense.window,
        code_attn_mask=coded.attn_mask,
        softcap=rest.softcap,
        sinks=rest.sinks,
    )


def _mixed_attention(query: Tensor, *args: Any) -> State:
    op = "mixed_attention"
    dense, args = split(Dense, args)
    coded, args = split(CodedInput, args)
    rest = Rest(*args)
    shape = _check_mixed(query, dense, coded, rest)
    more = _more_of_mixed(dense, coded, rest)
    uses = (*more, *uses_of_dense(query, dense.key, dense.value, dense.is_causal))
    kernel = _choose(op, query, coded, shape, rest.impl, uses)
    arguments = _coded_arguments(op, kernel, coded, shape, rest)
    visible = {"is_causal": dense.is_causal, "key_mask": dense.key_mask}
    state = kernel.run(query, dense.key, dense.value, **visible, **arguments, **more)
    return stored_as_query(state)


def _mixed_attention_fake(query: Tensor, *args: Any) -> State:
    dense, args = split(Dense, args)
    coded, args = split(CodedInput, args)
    _check_mixed(query, dense, coded, Rest(*args))
    return new_state(query, dense.value.shape[3])


_MIXED_ATTENTION = (
    f"mixed_attention(Tensor query, {DENSE}, {CODED}, Tensor? code_attn_mask, {SCORES}, str impl, "
    "bool? check) -> (Tensor, Tensor)"
)
register(_MIXED_ATTENTION, _mixed_attention, _mixed_attention_fake, replayed=True)


def _mixed_gradient(
    states: States, wanted: frozenset[str], query: Tensor, *args: Any
) -> Mapping[str, Tensor]:
    op = "mixed_attention"
    dense, args = split(Dense, args)
    coded, args = split(CodedInput, args)
    rest = Rest(*args)
    arguments = _gradient_arguments(op, query, coded, rest)
    arguments |= {"is_causal": dense.is_causal, "key_mask": dense.key_mask}
    gradient = _dispatch.choose_gradient(op, rest.impl)
    more = _more_of_mixed(dense, coded, rest)
    return gradient(*states, query, dense.key, dense.value, **arguments, **more, wanted=wanted)


register_gradient(
    _MIXED_ATTENTION,
    _mixed_gradient,
    to=(
        *("query", "key", "value", "key_codebook", "value_codebook"),
        *("attn_mask", "code_attn_mask", "sinks"),
    ),
)


def _check_codewords(
    query: Tensor, counts: Tensor, key_codebook: Tensor, value_codebook: Tensor
) -> None:
    op = "codeword_attention"
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
    _check_codewords(query, counts, key_codebook, value_codebook)
    if wants_check(check, counts):
        checks.check_counts(op, counts)
    uses = (VALUE_WIDTH,) if value_codebook.shape[3] != query.shape[3] else ()
    kernel = _dispatch.choose(op, impl, query.device, query.dtype, uses)
    return stored_as_query(kernel.run(query, counts, key_codebook, value_codebook, scale=scale))


def _codeword_attention_fake(
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    scale: float | None,
    impl: str,
    check: bool | None,
) -> State:
    _check_codewords(query, counts, key_codebook, value_codebook)
    return new_state(query, value_codebook.shape[3])


_CODEWORD_ATTENTION = (
    "codeword_attention(Tensor query, Tensor counts, Tensor key_codebook, Tensor value_codebook, "
    "float? scale, str impl, bool? check) -> (Tensor, Tensor)"
)
register(_CODEWORD_ATTENTION, _codeword_attention, _codeword_attention_fake, replayed=True)


def _codeword_gradient(
    states: States,
    wanted: frozenset[str],
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    scale: float | None,
    impl: str,
    check: bool | None,
) -> Mapping[str, Tensor]:
    gradient = _dispatch.choose_gradient("codeword_attention", impl)
    tables = (key_codebook, value_codebook)
    return gradient(*states, query, counts, *tables, scale=scale, wanted=wanted)


register_gradient(
    _CODEWORD_ATTENTION, _codeword_gradient, to=("query", "key_codebook", "value_codebook")
)
