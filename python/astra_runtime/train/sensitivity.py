"""What an error in a remote token's keys and values costs: the Fisher information of the output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codes.codebook import Codebook
from ..codes.layouts import merge_heads, split_heads
from ..codes.rotary import rotate, unrotate
from ..codes.simulated import Pair
from ..evaluate import answer_of
from ..models import Adapter, Inputs, adapt, is_language_model
from ..plan import Plan
from ..steady import give_back
from .calibration import Progress
from .simulate import Simulation

# Times the median length of a window's gradients, to which longer ones are shortened.
LONGEST = 3.0
# Of F's mean diagonal, added to it: what few windows say nothing of costs something too.
FLOOR = 3e-3
# Times F's own diagonal, added to F of a decoder: from few and short windows F is so rough, beside
# the diagonal above all, that this makes it a better guess at F of other windows, of the same text
# and of others (`docs/codebooks.md`).
DECODER_DIAGONAL = 2.0


class _Probe(Simulation):
    """Exact exchange, with the keys and values that other ranks see as leaves of the graph."""

    def __init__(
        self, model: nn.Module, plan: Plan, inputs: Inputs, rows: Sequence[Tensor] = ()
    ) -> None:
        super().__init__(model, Codebook.dense(), plan, inputs)
        self.leaves: dict[int, Tensor] = {}
        self.rows = rows

    def _remote_pairs(
        self, block: int, key: Tensor, value: Tensor, received: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        sent = self.layout.sent
        plain = unrotate(key[:, :, sent].float(), self.rope)
        y = merge_heads(plain, value[:, :, sent].float()).detach().requires_grad_()
        self.leaves[block] = y
        if self.rows:
            self.rows[block].copy_(y.detach().flatten(0, 1))
        remote_key, remote_value = split_heads(y, key.shape[1])
        return [(rotate(remote_key, self.rope), remote_value)]

    def _attend(
        self,
        rank: int,
        local: tuple[Tensor, ...],
        remote: Pair | None,
        seen: Tensor | None,
        scale: float,
    ) -> Tensor:
        """The same in one softmax of plain torch, whose gradient takes half the time."""
        shard = self.layout.shards[rank]
        query, key, value = local
        mask = self.local_masks[rank]
        if mask is None:
            mask = torch.ones(1, 1, shard.rows, shard.rows, dtype=torch.bool, device=query.device)
            mask = mask.tril() if self.plan.causal else mask
        assert remote is not None
        for part in shard.remote:
            remote_key, remote_value = (x[:, :, part] for x in remote)
            key, value = torch.cat([remote_key, key], 2), torch.cat([remote_value, value], 2)
            known = mask.new_ones(len(mask), 1, shard.rows, remote_key.shape[2])
            known[:, :, : shard.first] = False
            if self.counted is not None:
                known = known & self.counted[:, None, None, part]
            mask = torch.cat([known, mask], 3)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )

    def finish(self, hidden: Tensor) -> Tensor:
        """Without the first shard's tokens where these see no others: no gradient is theirs."""
        hidden = super().finish(hidden)
        if not (self.plan.causal and is_language_model(self.adapter.model)):
            return hidden
        return hidden[:, self.plan.copies + self.plan.size(0) :].contiguous()


def sensitivity(
    model: nn.Module,
    windows: Sequence[Inputs],
    *,
    prefix: int,
    world_size: int,
    seed: int,
    parts: Sequence[Sequence[Tensor]] = (),
    progress: Progress = lambda what, done, steps: None,
) -> Tensor:
    """F of every block, fp32 [L, E, E]: E[g·gᵀ], g the gradient by a remote token's y.

    The gradient is of the log-likelihood of answers that the model itself draws, so that half of
    δᵀFδ is, to second order, the Kullback–Leibler divergence that an error δ causes. Of a model
    without logits, the answer is its output and the error its square over its variance. One token
    in a hundred has more than half of E[g·gᵀ], so the longest gradients are shortened: what they
    say holds for themselves alone, and from few windows it would drown the rest.

    `parts`: of each window and block, where its keys and values are written to on the way; see
    `calibration.empty_pairs`.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "fit: expected a call outside of torch.inference_mode, as transform codes weigh errors "
            "by gradients, got one inside; use torch.no_grad"
        )
    adapter = adapt(model)
    width = 2 * adapter.num_key_value_heads * adapter.head_dim
    total = torch.zeros(len(adapter.blocks), width, width, dtype=torch.float64)

    def of_window(number: int, inputs: Inputs) -> int:
        """Adds a window's part to the total; its tokens."""
        plan = _equal_plan(adapter, inputs, prefix, world_size)
        generator = torch.Generator(adapter.device).manual_seed(seed + number)
        probe = _Probe(model, plan, inputs, parts[number] if parts else ())
        with torch.enable_grad():
            output = probe.run()
            answer = answer_of(output)
            slope = _drawn_slope(answer, "last_hidden_state" in output, generator)
            leaves = [probe.leaves.pop(n) for n in range(len(adapter.blocks))]
            gradients = _gradients(answer, slope, leaves)
        # nobody receives the last shard
        received = plan.bounds[-2] if plan.causal else plan.tokens
        for block, gradient in enumerate(gradients):
            rows = _shortened(gradient[:, :received].flatten(0, 1).float())
            total[block] += (rows.T @ rows).cpu()
        return len(rows)

    count = 0
    progress("weighing", 0, len(windows))
    with _frozen(model):
        for number, window in enumerate(windows):  # one by one: a pass takes much memory
            count += of_window(number, window)
            give_back()
            progress("weighing", number + 1, len(windows))
    if not bool(total.isfinite().all()):
        raise ValueError("model: gradients are not finite on the calibration data")
    return (total / count).float()


def _shortened(gradients: Tensor) -> Tensor:
    """Rows [n, E], none longer than LONGEST times the median of those that are not 0."""
    lengths = gradients.norm(dim=1)
    some = lengths[lengths > 0]
    if not len(some):
        return gradients
    return gradients * (LONGEST * some.median() / lengths).clamp(max=1)[:, None]


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients by weights, for which every layer would keep its input."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _gradients(answer: Tensor, slope: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of (answer · slope).sum() by the leaves. ValueError: they do not pass through the model."""
    gradients: tuple[Tensor | None, ...] = (None,)
    if answer.requires_grad:
        gradients = torch.autograd.grad(answer, leaves, slope, allow_unused=True)
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


@torch.no_grad()
def _drawn_slope(answer: Tensor, is_hidden: bool, generator: torch.Generator) -> Tensor:
    """The gradient, by what the model answers, of the negative log-likelihood of answers drawn from
    the model's own distribution; of the same shape. Final hidden states, and the one number of a
    regression, have a normal distribution."""
    if not is_hidden and answer.shape[-1] > 1:
        if not bool(torch.stack(answer.aminmax()).isfinite().all()):
            raise ValueError("model: its output is not finite on the calibration data")
        chances = answer.flatten(0, -2).float().softmax(-1)
        drawn = _drawn(chances, generator)
        chances.scatter_add_(1, drawn, chances.new_full(drawn.shape, -1.0))
        return chances.view_as(answer).to(answer.dtype)
    kind: dict[str, Any] = {"dtype": torch.float32, "device": answer.device}
    direction = torch.randn(answer.shape, generator=generator, **kind)
    spread = answer.float().std() if answer.numel() > 1 else 1.0
    return (direction / spread).to(answer.dtype)


def _drawn(chances: Tensor, generator: torch.Generator) -> Tensor:
    """An index of each row of `chances` [n, V], drawn with that chance: int64 [n, 1].

    From one random number a row, where `torch.multinomial` draws one for every entry.
    """
    sums = chances.cumsum(-1)
    place = torch.rand(
        len(chances), 1, generator=generator, dtype=torch.float32, device=chances.device
    )
    drawn = torch.searchsorted(sums, place * sums[:, -1:], right=True)
    return drawn.clamp(max=chances.shape[1] - 1)


@dataclass(frozen=True, eq=False)
class Cost:
    """Symmetric square roots of every block's F, and their inverses, [L, E, E] both."""

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, fisher: Tensor, floor: float = FLOOR, diagonal: float = 0.0) -> Cost:
        """Of F [L, E, E] and `diagonal` times its diagonal, with a floor under the eigenvalues, a
        share of the mean of F's."""
        own = fisher.diagonal(dim1=1, dim2=2)
        mean = own.mean(-1).clamp(min=1e-20)
        values, axes = torch.linalg.eigh(fisher + torch.diag_embed(diagonal * own))
        spread = (values.clamp(min=0) + floor * mean[:, None]).sqrt()[:, None]
        back = axes.transpose(1, 2)
        return cls((axes * spread) @ back, (axes / spread) @ back)
