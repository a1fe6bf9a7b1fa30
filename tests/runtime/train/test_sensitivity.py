"""What an error of a key or value costs, which fits weigh errors by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.codes.layouts import split_heads
from astra_runtime.codes.rotary import rotate
from astra_runtime.plan import Plan
from astra_runtime.train.calibration import as_windows
from astra_runtime.train.sensitivity import Cost, _shortened, sensitivity
from astra_runtime.train.simulate import Simulation

from ..models import tiny, windows_for


def test_sensitivity_is_what_an_error_costs() -> None:
    """½·δᵀFδ against the divergence that errors really cause, block by block."""
    model = tiny("llama")
    windows = as_windows(windows_for("llama", count=24, tokens=40))
    cost = sensitivity(model, windows, prefix=1, world_size=2, seed=0)
    plan = Plan.make(39, 2, causal=True, copies=1)
    for block in range(3):
        told = real = 0.0
        for number, inputs in enumerate(windows[:8]):
            generator = torch.Generator().manual_seed(number)
            width = cost.shape[-1]
            delta = 0.03 * torch.randn(1, 39, width, generator=generator)
            delta[:, plan.bounds[1] :] = 0

            class Off(Simulation):
                def _remote_pairs(self, at: int, key: Tensor, value: Tensor, *given: Any) -> Any:
                    ((far, far_value),) = super()._remote_pairs(at, key, value, *given)
                    if at == block:  # noqa: B023
                        rows = split_heads(delta, key.shape[1])  # noqa: B023
                        far, far_value = far + rotate(rows[0], self.rope), far_value + rows[1]
                    return [(far, far_value)]

            with torch.inference_mode():
                exact = (
                    Simulation(model, Codebook.none(), plan, inputs).run().logits.log_softmax(-1)
                )
                off = Off(model, Codebook.none(), plan, inputs).run().logits.log_softmax(-1)
            real += float((exact.exp() * (exact - off)).sum())
            told += 0.5 * float(torch.einsum("btu,uv,btv->", delta, cost[block], delta))
        assert told == pytest.approx(real, rel=0.35), block


def test_few_long_gradients_do_not_drown_the_others() -> None:
    rows = torch.randn(101, 6, generator=torch.Generator().manual_seed(0))
    rows = rows / rows.norm(dim=1, keepdim=True) * torch.linspace(1, 2, 101)[:, None]
    rows[7] *= 1000
    rows[8] = 0
    found = _shortened(rows)
    torch.testing.assert_close(found[7], rows[7] / rows[7].norm() * 4.5, rtol=0.02, atol=0)
    others = torch.arange(101) != 7
    assert torch.equal(found[others], rows[others])
    assert torch.equal(_shortened(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_weights_ask_for_gradients_as_before() -> None:
    model = tiny("gpt2")
    first, *others = model.parameters()
    first.requires_grad_(False)
    cost = sensitivity(model, as_windows(windows_for("gpt2")[:1]), prefix=1, world_size=2, seed=0)
    assert bool((cost.diagonal(dim1=1, dim2=2) > 0).all())
    assert not first.requires_grad
    assert all(weight.requires_grad for weight in others)
    assert all(weight.grad is None for weight in model.parameters())


def test_roots_squared_are_the_costs() -> None:
    half = torch.randn(2, 6, 6)
    cost = half @ half.transpose(1, 2)
    found = Cost.of(cost)
    torch.testing.assert_close(found.root, found.root.transpose(1, 2))
    torch.testing.assert_close(found.root @ found.root, cost, rtol=0.05, atol=0.05)
    torch.testing.assert_close(found.root @ found.inverse, torch.eye(6).repeat(2, 1, 1))
    raised = Cost.of(cost, 0.5).root
    more = 0.5 * cost.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(6)
    torch.testing.assert_close(raised @ raised, cost + more, rtol=1e-4, atol=1e-4)
    shrunk = Cost.of(cost, 0.0, 2.0).root
    own = torch.diag_embed(cost.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(shrunk @ shrunk, cost + 2 * own, rtol=1e-4, atol=1e-4)
