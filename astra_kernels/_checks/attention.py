"""The dense side of attention, and the states that are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels._checks.arguments import (
    FLOATING,
    check_device,
    check_dtype,
    check_ndim,
    check_softcap,
    fail_value,
    shape_of,
)

_STATE_DTYPES = (torch.float32, torch.float64)


def check_query(op: str, query: Tensor) -> None:
    check_dtype(op, "query", query, FLOATING)
    check_ndim(op, "query", query, "B, H, M, d")
    if query.shape[3] == 0:
        fail_value(op, "query", "[B, H, M, d] with d of at least 1", shape_of(query))


def check_heads(op: str, query: Tensor, name: str, kv_heads: int) -> None:
    heads = query.shape[1]
    if kv_heads < 1 or heads % kv_heads != 0:
        fail_value(op, name, f"for a number of KV heads that divides H = {heads}", kv_heads)


def check_dense(
    op: str, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
) -> None:
    batch, _, _, dim = query.shape
    dtypes, device = (query.dtype,), query.device
    check_dtype(op, "key", key, dtypes)
    check_dtype(op, "value", value, dtypes)
    check_ndim(op, "key", key, "B, Hkv, L, d")
    check_ndim(op, "value", value, "B, Hkv, L, d_v")
    check_device(op, "key", key, device)
    check_device(op, "value", value, device)
    if key.shape[0] != batch or key.shape[3] != dim:
        fail_value(op, "key", f"[{batch}, Hkv, L, {dim}] (B and d of query)", shape_of(key))
    other = value.shape != key.shape
    if other and (value.shape[:3] != key.shape[:3] or (value.shape[3] < 1 and dim > 0)):
        sizes = ", ".join(str(size) for size in key.shape[:3])
        expected = f"[{sizes}, d_v] with d_v >= 1 (B, Hkv and L of key)"
        fail_value(op, "value", expected, shape_of(value))
    check_heads(op, query, "key", key.shape[1])
    if key_mask is not None:
        check_mask(op, "key_mask", key_mask, batch, key.shape[2])
        check_device(op, "key_mask", key_mask, query.device)


def check_mask(op: str, name: str, mask: Tensor, batch: int, tokens: int) -> None:
    check_dtype(op, name, mask, (torch.bool,))
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] != tokens:
        fail_value(op, name, f"[{batch}, {tokens}] (True = visible)", shape_of(mask))


def check_attn_mask(op: str, name: str, mask: Tensor, query: Tensor, tokens: int) -> None:
    """bool, query's dtype or that of its scores; broadcasts to [B, H, M, tokens]."""
    floating = (query.dtype,) if query.dtype == torch.float64 else (query.dtype, torch.float32)
    check_dtype(op, name, mask, (torch.bool, *dict.fromkeys(floating)))
    full = (*query.shape[:3], tokens)
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    if not 1 <= mask.ndim <= 4 or any(size != 1 and size != most for size, most in sizes):
        fail_value(op, name, f"broadcastable to {list(full)} ([B, H, M, tokens])", shape_of(mask))
    check_device(op, name, mask, query.device)


def check_scores(op: str, query: Tensor, softcap: float | None, sinks: Tensor | None) -> None:
    check_softcap(op, softcap)
    if sinks is None:
        return
    check_dtype(
        op, "sinks", sinks, _STATE_DTYPES if query.dtype == torch.float64 else (torch.float32,)
    )
    if sinks.ndim != 1 or sinks.shape[0] != query.shape[1]:
        fail_value(op, "sinks", f"[{query.shape[1]}] (H of query)", shape_of(sinks))
    check_device(op, "sinks", sinks, query.device)


def check_merge(op: str, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    check_dtype(op, "out_a", out_a, FLOATING)
    check_dtype(op, "out_b", out_b, (out_a.dtype,))
    if out_a.ndim < 1 or out_b.shape != out_a.shape:
        fail_value(op, "out_b", f"of out_a's shape {list(out_a.shape)}", shape_of(out_b))
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_dtype(op, name, lse, _STATE_DTYPES)
        if lse.shape != out_a.shape[:-1]:
            expected = f"of out_a's shape without d, {list(out_a.shape[:-1])}"
            fail_value(op, name, expected, shape_of(lse))
    check_dtype(op, "lse_b", lse_b, (lse_a.dtype,))
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        check_device(op, name, tensor, out_a.device)


def check_merge_states(op: str, outs: Tensor, lses: Tensor) -> None:
    check_dtype(op, "outs", outs, FLOATING)
    if outs.ndim < 2:
        fail_value(op, "outs", "[S, ..., d]", shape_of(outs))
    check_dtype(op, "lses", lses, _STATE_DTYPES)
    if lses.shape != outs.shape[:-1]:
        expected = f"of outs' shape without d, {list(outs.shape[:-1])}"
        fail_value(op, "lses", expected, shape_of(lses))
    check_device(op, "lses", lses, outs.device)
