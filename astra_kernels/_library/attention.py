"""Dense attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from astra_kernels import _checks as checks
from astra_kernels import _dispatch
from astra_kernels._dispatch import MORE_QUERIES, VALUE_WIDTH
from astra_kernels._library.gradients import States, register_gradient
from astra_kernels._library.registration import State, register

# What says which keys a query sees, and what becomes of their scores, in the ops' schemas.
DENSE = (
    "Tensor key, Tensor value, bool is_causal, Tensor? key_mask, Tensor? attn_mask, "
    "SymInt[]? window"
)
SCORES = "float? scale, float? softcap, Tensor? sinks"
SCHEMA = f"attention(Tensor query, {DENSE}, {SCORES}, str impl) -> (Tensor, Tensor)"


def new_state(query: Tensor, width: int) -> State:
    """Uninitialized out and lse, as every implementation leaves them: out [B, H, M, width] is
    stored as [B, M, H, width], lse is fp32, or fp64 for fp64 queries."""
    batch, heads, rows, _ = query.shape
    out = query.new_empty((batch, rows, heads, width)).transpose(1, 2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty((batch, heads, rows), dtype=dtype)


def stored_as_query(state: State) -> State:
    """Every implementation's out leaves stored as [B, M, H, d_v], as the fake kernels promise."""
    out, lse = state
    stored = out.transpose(1, 2)
    return (out if stored.is_contiguous() else stored.contiguous().transpose(1, 2)), lse


def given(**arguments: object) -> dict[str, Any]:
    """The optional arguments that a call has: an implementation hears of no others."""
    return {name: value for name, value in arguments.items() if value is not None}


def uses_of_dense(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[str, ...]:
    """What a call asks for that no argument says."""
    uses = () if value.shape == key.shape else (VALUE_WIDTH,)
    return (*uses, MORE_QUERIES) if is_causal and query.shape[2] > key.shape[2] else uses


def check_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    window: Sequence[int] | None,
) -> None:
    checks.check_query(op, query)
    checks.check_dense(op, query, key, value, key_mask)
    if attn_mask is not None:
        checks.check_attn_mask(op, "attn_mask", attn_mask, query, key.shape[2])
    if window is not None:
        checks.check_window(op, window)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    window: Sequence[int] | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    impl: str,
) -> State:
    op = "attention"
    check_attention(op, query, key, value, key_mask, attn_mask, window)
    uses = uses_of_dense(query, key, value, is_causal)
    more = {}
    # Small calls are as quick as they are without these arguments.
    if attn_mask is not None or window is not None or softcap is not None or sinks is not None:
        checks.check_scores(op, query, softcap, sinks)
        more = given(attn_mask=attn_mask, window=window, softcap=softcap, sinks=sinks)
        uses = (*more, *uses)
    kernel = _dispatch.choose(op, impl, query.device, query.dtype, uses)
    return stored_as_query(
        kernel.run(query, key, value, is_causal=is_causal, key_mask=key_mask, scale=scale, **more)
    )


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    window: Sequence[int] | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    impl: str,
) -> State:
    op = "attention"
    check_attention(op, query, key, value, key_mask, attn_mask, window)
    checks.check_scores(op, query, softcap, sinks)
    return new_state(query, value.shape[3])


register(SCHEMA, _attention, _attention_fake, replayed=True)


def _attention_gradient(
    states: States,
    wanted: frozenset[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    window: Sequence[int] | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    impl: str,
) -> Mapping[str, Tensor]:
    more = given(attn_mask=attn_mask, window=window, softcap=softcap, sinks=sinks)
    visible = {"is_causal": is_causal, "key_mask": key_mask, "scale": scale}
    gradient = _dispatch.choose_gradient("attention", impl)
    return gradient(*states, query, key, value, **visible, **more, wanted=wanted)


register_gradient(SCHEMA, _attention_gradient, to=("query", "key", "value", "attn_mask", "sinks"))
