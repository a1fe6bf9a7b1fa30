"""Partial softmaxes that become one."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _checks as checks
from astra_kernels import _dispatch
from astra_kernels._library.registration import State, register


def _check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    op = "merge_state"
    checks.check_forward_only(op, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    checks.check_merge(op, out_a, lse_a, out_b, lse_b)


def _merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, impl: str) -> State:
    _check_merge(out_a, lse_a, out_b, lse_b)
    dtype = torch.promote_types(out_a.dtype, lse_a.dtype)
    out, lse = _dispatch.choose("merge_state", impl, out_a.device, dtype).run(
        out_a, lse_a, out_b, lse_b
    )
    stored = torch.empty_like(out_a)
    return (out if out.stride() == stored.stride() else stored.copy_(out)), lse


def _merge_state_fake(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, impl: str
) -> State:
    _check_merge(out_a, lse_a, out_b, lse_b)
    return torch.empty_like(out_a), torch.empty_like(lse_a, memory_format=torch.contiguous_format)


register(
    "merge_state(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str impl) "
    "-> (Tensor, Tensor)",
    _merge_state,
    _merge_state_fake,
)


def _check_merge_states(outs: Tensor, lses: Tensor) -> None:
    checks.check_forward_only("merge_states", outs=outs, lses=lses)
    checks.check_merge_states("merge_states", outs, lses)


def _merge_states(outs: Tensor, lses: Tensor, impl: str) -> State:
    _check_merge_states(outs, lses)
    dtype = torch.promote_types(outs.dtype, lses.dtype)
    out, lse = _dispatch.choose("merge_states", impl, outs.device, dtype).run(outs, lses)
    return out.contiguous(), lse.contiguous()


def _merge_states_fake(outs: Tensor, lses: Tensor, impl: str) -> State:
    _check_merge_states(outs, lses)
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


register(
    "merge_states(Tensor outs, Tensor lses, str impl) -> (Tensor, Tensor)",
    _merge_states,
    _merge_states_fake,
)
