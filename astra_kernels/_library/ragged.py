"""Attention over sequences laid end to end, and over pages of codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from astra_kernels import _checks as checks
from astra_kernels import _dispatch
from astra_kernels._checks import CodedInput
from astra_kernels._library.attention import SCORES, given, new_state, uses_of_dense
from astra_kernels._library.coded import Rest, check_scored_codes, coded_gradient, value_width
from astra_kernels._library.gradients import States, register_gradient
from astra_kernels._library.packing import unpack_rows
from astra_kernels._library.registration import KERNELS, State, register, split, wants_check

_VARLEN = (
    "attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, "
    f"Tensor cu_seqlens_k, bool is_causal, SymInt[]? window, {SCORES}, str impl) "
    "-> (Tensor, Tensor)"
)
Segment = tuple[slice, slice]  # of the queries and of the keys


def _segments(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Iterator[Segment]:
    """Sequence by sequence; those without queries are left out."""
    op = "attention_varlen"
    starts = checks.read_offsets(op, "cu_seqlens_q", cu_seqlens_q, query.shape[0])
    keys = checks.read_offsets(op, "cu_seqlens_k", cu_seqlens_k, key.shape[0])
    for b in range(len(starts) - 1):
        if starts[b] < starts[b + 1]:
            yield slice(starts[b], starts[b + 1]), slice(keys[b], keys[b + 1])


def _batch(tensor: Tensor, tokens: slice) -> Tensor:
    """Tokens of [T, H, d] as a batch of one, [1, H, M, d]."""
    return tensor[tokens].transpose(0, 1)[None]


def _check_varlen(
    query: Tensor, key: Tensor, value: Tensor, offsets: tuple[Tensor, Tensor], scores: Any
) -> None:
    op = "attention_varlen"
    window, softcap, sinks = scores
    checks.check_varlen(op, query, key, value, *offsets)
    if window is not None:
        checks.check_window(op, window)
    checks.check_scores(op, query, softcap, sinks)


def _new_ragged(query: Tensor, width: int) -> State:
    tokens, heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((tokens, heads, width)), query.new_empty((tokens, heads), dtype=dtype)


def _attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool,
    window: Sequence[int] | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    impl: str,
) -> State:
    _check_varlen(query, key, value, (cu_seqlens_q, cu_seqlens_k), (window, softcap, sinks))
    more = given(window=window, softcap=softcap, sinks=sinks)
    out, lse = _new_ragged(query, value.shape[2])
    for rows, seen in _segments(query, key, cu_seqlens_q, cu_seqlens_k):
        one = [_batch(query, rows), _batch(key, seen), _batch(value, seen)]
        uses = (*more, *uses_of_dense(one[0], one[1], one[2], is_causal))
        kernel = _dispatch.choose("attention", impl, query.device, query.dtype, uses)
        state = kernel.run(*one, is_causal=is_causal, key_mask=None, scale=scale, **more)
        out[rows], lse[rows] = state[0][0].transpose(0, 1), state[1][0].transpose(0, 1)
    return out, lse


def _attention_varlen_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool,
    window: Sequence[int] | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    impl: str,
) -> State:
    _check_varlen(query, key, value, (cu_seqlens_q, cu_seqlens_k), (window, softcap, sinks))
    return _new_ragged(query, value.shape[2])


register(_VARLEN, _attention_varlen, _attention_varlen_fake)


def _varlen_gradient(
    states: States,
    wanted: frozenset[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool,
    window: Sequence[int] | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    impl: str,
) -> Mapping[str, Tensor]:
    more = given(window=window, softcap=softcap, sinks=sinks)
    gradient = _dispatch.choose_gradient("attention", impl)
    named = {"query": query, "key": key, "value": value, "sinks": sinks}
    grads = {n: torch.zeros_like(t) for n, t in named.items() if n in wanted and t is not None}
    for rows, seen in _segments(query, key, cu_seqlens_q, cu_seqlens_k):
        state = [None if s is None else s[rows].transpose(0, 1)[None] for s in states]
        one = (_batch(query, rows), _batch(key, seen), _batch(value, seen))
        options = {"is_causal": is_causal, "scale": scale, **more}
        parts = gradient(*state, *one, **options, wanted=wanted)
        for name, grad in grads.items():
            if name == "sinks":
                grad += parts[name]
            else:
                tokens = rows if name == "query" else seen
                grad[tokens] += parts[name][0].transpose(0, 1)
    return grads


register_gradient(_VARLEN, _varlen_gradient, to=("query", "key", "value", "sinks"))


class Pages(NamedTuple):
    """The codes of a call, as the op's schema has them."""

    pages: Tensor
    block_table: Tensor
    lengths: Tensor
    key_codebook: Tensor
    value_codebook: Tensor
    code_bits: int
    page_tokens: int
    cos: Tensor | None
    sin: Tensor | None
    attn_mask: Tensor | None


_PAGED = (
    "coded_attention_paged(Tensor query, Tensor pages, Tensor block_table, Tensor lengths, "
    "Tensor key_codebook, Tensor value_codebook, int code_bits, int page_tokens, Tensor? cos, "
    f"Tensor? sin, Tensor? attn_mask, {SCORES}, str impl, bool? check) "
    "-> (Tensor, Tensor)"
)


def _check_paged(query: Tensor, paged: Pages) -> int:
    op = "coded_attention_paged"
    checks.check_query(op, query)
    stages = checks.check_tables(op, query, paged.key_codebook, paged.value_codebook)
    return checks.check_pages(
        op,
        query,
        paged.pages,
        paged.block_table,
        paged.lengths,
        paged.code_bits,
        paged.page_tokens,
        (stages.stages * stages.kv_heads * stages.groups, stages.stages * stages.groups),
    )


def _gathered(paged: Pages, codes_per_token: int) -> CodedInput:
    """The pages of every sequence side by side, with what lies behind its length hidden.

    That copies codes, a hundredth of the bytes that keys and values would be.
    """
    batch, count = paged.block_table.shape
    tokens = count * paged.page_tokens
    places = paged.block_table.long().clamp(0, max(0, len(paged.pages) - 1))
    if len(paged.pages) == 0:
        places, tokens = places[:, :0], 0
    rows = paged.pages[places.flatten()]
    bits: int | None = paged.code_bits
    if paged.page_tokens * codes_per_token * paged.code_bits % 8 == 0:
        codes = rows.reshape(batch, places.shape[1] * rows.shape[1])  # pages end with a byte
    else:
        unpacked = unpack_rows(rows, paged.code_bits, paged.page_tokens, codes_per_token)
        codes, bits = unpacked.reshape(batch, tokens, codes_per_token), None
    steps = torch.arange(tokens, device=paged.lengths.device)
    return CodedInput(
        codes,
        paged.key_codebook,
        paged.value_codebook,
        None,
        bits,
        tokens,
        paged.cos,
        paged.sin,
        steps < paged.lengths[:, None],
        paged.attn_mask,
    )


def _coded_attention_paged(query: Tensor, *args: Any) -> State:
    paged, args = split(Pages, args)
    per_token = _check_paged(query, paged)
    if wants_check(args[-1], paged.block_table):
        op = "coded_attention_paged"
        table, lengths = paged.block_table, paged.lengths
        checks.check_page_values(op, paged.pages, table, lengths, paged.page_tokens)
    state: State = KERNELS["coded_attention"](query, *_gathered(paged, per_token), *args)
    return state


def _coded_attention_paged_fake(query: Tensor, *args: Any) -> State:
    paged, args = split(Pages, args)
    per_token = _check_paged(query, paged)
    check_scored_codes("coded_attention_paged", query, _gathered(paged, per_token), Rest(*args))
    return new_state(query, value_width(paged.value_codebook))


register(_PAGED, _coded_attention_paged, _coded_attention_paged_fake)


def _paged_gradient(
    states: States, wanted: frozenset[str], query: Tensor, *args: Any
) -> Mapping[str, Tensor]:
    paged, args = split(Pages, args)
    coded = _gathered(paged, _check_paged(query, paged))
    return coded_gradient(states, wanted, query, *coded, *args)


register_gradient(
    _PAGED,
    _paged_gradient,
    to=("query", "key_codebook", "value_codebook", "attn_mask", "sinks"),
)
