"""Partial softmaxes that become one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from astra_kernels import _checks as checks
from astra_kernels import _dispatch
from astra_kernels._library.gradients import States, register_gradient
from astra_kernels._library.registration import State, register
from astra_kernels.merge_states.gradient import merge_states as merge_states_gradient


def _check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    checks.check_merge("merge_state", out_a, lse_a, out_b, lse_b)


def _merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, impl: str) -> State:
    _check_merge(out_a, lse_a, out_b, lse_b)
    dtype = torch.promote_types(out_a.dtype, lse_a.dtype)
    out, lse = _dispatch.choose("merge_state", impl, out_a.device, dtype).run(
        out_a, lse_a, out_b, lse_b
    )
    if out.stride() != out_a.stride():  # else it is as `empty_like` would have it
        stored = torch.empty_like(out_a)
        out = out if out.stride() == stored.stride() else stored.copy_(out)
    return out, lse


def _merge_state_fake(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, impl: str
) -> State:
    _check_merge(out_a, lse_a, out_b, lse_b)
    return torch.empty_like(out_a), torch.empty_like(lse_a, memory_format=torch.contiguous_format)


_MERGE_STATE = (
    "merge_state(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str impl) "
    "-> (Tensor, Tensor)"
)
register(_MERGE_STATE, _merge_state, _merge_state_fake, replayed=True)


def _merge_state_gradient(
    states: States,
    wanted: frozenset[str],
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    impl: str,
) -> Mapping[str, Tensor]:
    grad_out, grad_lse, out, _ = states
    outs, lses = (out_a, out_b), torch.stack((lse_a, lse_b))
    grad_outs, grad_lses = merge_states_gradient(grad_out, grad_lse, out, outs, lses)
    result = dict(zip(("out_a", "out_b"), grad_outs, strict=True))
    return result | dict(zip(("lse_a", "lse_b"), grad_lses, strict=True))


register_gradient(_MERGE_STATE, _merge_state_gradient, to=("out_a", "lse_a", "out_b", "lse_b"))


def _check_merge_states(outs: Tensor, lses: Tensor) -> None:
    checks.check_merge_states("merge_states", outs, lses)


def _merge_states(outs: Tensor, lses: Tensor, impl: str) -> State:
    _check_merge_states(outs, lses)
    dtype = torch.promote_types(outs.dtype, lses.dtype)
    out, lse = _dispatch.choose("merge_states", impl, outs.device, dtype).run(outs, lses)
    return out.contiguous(), lse.contiguous()


def _merge_states_fake(outs: Tensor, lses: Tensor, impl: str) -> State:
    _check_merge_states(outs, lses)
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


_MERGE_STATES = "merge_states(Tensor outs, Tensor lses, str impl) -> (Tensor, Tensor)"
register(_MERGE_STATES, _merge_states, _merge_states_fake, replayed=True)


def _merge_states_gradient(
    states: States, wanted: frozenset[str], outs: Tensor, lses: Tensor, impl: str
) -> Mapping[str, Tensor]:
    grad_out, grad_lse, out, _ = states
    grad_outs, grad_lses = merge_states_gradient(grad_out, grad_lse, out, outs.unbind(), lses)
    grads = torch.stack(grad_outs) if grad_outs else torch.zeros_like(outs)
    return {"outs": grads, "lses": grad_lses}


register_gradient(_MERGE_STATES, _merge_states_gradient, to=("outs", "lses"))
