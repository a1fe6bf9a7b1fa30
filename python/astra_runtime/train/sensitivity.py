"""What an error in a remote token's keys and values costs: the Fisher information of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codes.codebook import Codebook
from ..codes.layouts import merge_heads, split_heads
from ..codes.rotary import rotate, unrotate
from ..models import Adapter, Inputs, adapt, is_language_model
from ..parallel import map_cores
from ..plan import Plan
from .calibration import Progress
from .simulate import Simulation

# Of F's mean diagonal, added to it: what few windows say nothing of costs something too.
FLOOR = 3e-3


class _Probe(Simulation):
    """Exact exchange, with the keys and values that other ranks see as leaves of the graph."""

    def __init__(self, model: nn.Module, plan: Plan, inputs: Inputs) -> None:
        super().__init__(model, Codebook.dense(), plan, inputs)
        self.leaves: dict[int, Tensor] = {}

    def _remote_pairs(
        self, block: int, key: Tensor, value: Tensor, received: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        sent = self.layout.sent
        plain = unrotate(key[:, :, sent].float(), self.rope)
        y = merge_heads(plain, value[:, :, sent].float()).detach().requires_grad_()
        self.leaves[block] = y
        remote_key, remote_value = split_heads(y, key.shape[1])
        return [(rotate(remote_key, self.rope), remote_value)]


def sensitivity(
    model: nn.Module,
    windows: Sequence[Inputs],
    *,
    prefix: int,
    world_size: int,
    seed: int,
    progress: Progress = lambda what, done, steps: None,
) -> Tensor:
    """F of every block, fp32 [L, E, E]: E[g·gᵀ], g the gradient by a remote token's y.

    The gradient is of the log-likelihood of answers that the model itself draws, so that half of
    δᵀFδ is, to second order, the Kullback–Leibler divergence that an error δ causes. Of a model
    without logits, the answer is its output and the error its square over its variance.
    """
    adapter = adapt(model)
    total = torch.zeros(len(adapter.blocks), 1, 1, dtype=torch.float64)

    def of_window(numbered: tuple[int, Inputs]) -> tuple[Tensor, int]:
        number, inputs = numbered
        plan = _equal_plan(adapter, inputs, prefix, world_size)
        generator = torch.Generator(adapter.device).manual_seed(seed + number)
        probe = _Probe(model, plan, inputs)
        with torch.enable_grad():
            loss = _drawn_loss(model, probe.run(), generator)
            gradients = _gradients(loss, [probe.leaves[n] for n in range(len(adapter.blocks))])
        # nobody receives the last shard
        received = plan.bounds[-2] if plan.causal else plan.tokens
        rows = torch.stack([g[:, :received].flatten(0, 1) for g in gradients]).double()
        return (rows.transpose(1, 2) @ rows).cpu(), rows.shape[1]

    count = 0
    progress("weighing", 0, len(windows))
    for done, (gram, tokens) in enumerate(map_cores(of_window, list(enumerate(windows)))):
        total, count = total + gram, count + tokens
        progress("weighing", done + 1, len(windows))
    if not bool(total.isfinite().all()):
        raise ValueError("model: gradients are not finite on the calibration data")
    return (total / count).float()


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of the loss by the leaves. ValueError: they do not pass through the model."""
    gradients: tuple[Tensor | None, ...] = (None,)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    through = [gradient for gradient in gradients if gradient is not None]
    if len(through) < len(leaves):
        raise ValueError(
            "model: expected one that gradients pass through, by which transform codes weigh "
            "errors, got one that cuts them, as quantized layers do: fit on the model before it "
            "was quantized, or in another space"
        )
    return through


def _equal_plan(adapter: Adapter, inputs: Inputs, prefix: int, world_size: int) -> Plan:
    tokens = adapter.count(inputs)[1] - prefix
    copies = adapter.class_tokens + prefix
    ranks = min(world_size, tokens)
    return Plan.make(tokens, ranks, causal=adapter.causal, copies=copies)


def _drawn_loss(model: nn.Module, output: Any, generator: torch.Generator) -> Tensor:
    """The negative log-likelihood of answers drawn from the model's own distribution."""
    if is_language_model(model) or "logits" in output:
        logits = output.logits.flatten(0, -2).float()
        if not bool(logits.isfinite().all()):
            raise ValueError("model: its output is not finite on the calibration data")
        with torch.no_grad():
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        return F.cross_entropy(logits, drawn, reduction="sum")
    answer = output.last_hidden_state.float()
    direction = torch.randn(answer.shape, generator=generator, device=answer.device)
    return (answer * direction).sum() / answer.detach().std()


@dataclass(frozen=True, eq=False)
class Cost:
    """Symmetric square roots of every block's F, and their inverses, [L, E, E] both."""

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, fisher: Tensor) -> Cost:
        """With a floor under the eigenvalues of F."""
        mean = fisher.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-20)
        values, axes = torch.linalg.eigh(fisher)
        spread = (values.clamp(min=0) + FLOOR * mean[:, None]).sqrt()[:, None]
        back = axes.transpose(1, 2)
        return cls((axes * spread) @ back, (axes / spread) @ back)
