"""Fitting predictive transform codes: what an error costs, where bits go, then block by block.

The formulas are those of `codes/predictive.py`. Three steps:

1. `sensitivity`: F of every block, from gradients of the model's own, sampled answers with respect
   to the keys and values that other ranks see. Two backward passes' worth of work a window.
2. `allocate`: codes a block, by reverse water-filling on the Gaussian model that linear regression
   of one block's keys and values on the last one's gives (a Kalman filter's covariances).
3. `fit_blocks`: predictor, axes and codewords of each block in turn, on what the blocks before
   really left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codes.codebook import Codebook
from ..codes.layouts import merge_heads, split_heads
from ..codes.predictive import DecoderState, Transform, nearest_codewords, rms_normalized
from ..codes.rotary import rotate, unrotate
from ..models import Adapter, Inputs, adapt, is_language_model
from ..parallel import map_cores
from ..plan import Plan
from .calibration import Progress
from .kmeans import kmeans
from .simulate import Simulation

RIDGE = 3e-3  # of the features' own variance, in regressions
# Of F's mean diagonal, added to it: what few windows say nothing of costs something too.
FLOOR = 3e-3
SEARCH = 24  # steps towards the water level, at most
STRIDE = 6.0  # the first ones, in its logarithm: three bits more on every axis
MEMBERS = 64  # vectors a codeword that k-means sees: more cost time and change little
SAMPLE = 8192  # rows are enough to tell where bits go


# What an error costs.


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
        heard = plan.bounds[-2] if plan.causal else plan.tokens  # nobody hears the last shard
        rows = torch.stack([g[:, :heard].flatten(0, 1) for g in gradients]).double()
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


@dataclass(frozen=True)
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


# Where bits go.


@dataclass
class Rows:
    """Calibration tokens, side by side: y of a block [n, E], and what every rank knows at once."""

    blocks: list[Tensor]
    embedding: Tensor | None

    def known(self, transforms: Sequence[Transform]) -> DecoderState:
        first = None if self.embedding is None else self.blocks[0][None]
        embedding = None if self.embedding is None else self.embedding[None]
        return DecoderState(transforms, first, embedding)


def regression(gram: Tensor, cross: Tensor, count: int) -> Tensor:
    """Ridge regression of `count` centred rows x on y: [F, E], from xᵀx and xᵀy."""
    raised = gram.clone()
    raised.diagonal().mul_(1 + RIDGE).add_(1e-6 * count)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(raised))


@dataclass
class _Model:
    """A block's y as a linear function of the last block's, plus ê, plus noise.

    Attributes:
        step: [E, E], what an error of the last block becomes; noise: [E, E], covariance.
    """

    step: Tensor
    noise: Tensor


def _models(rows: Rows) -> Iterator[_Model]:
    """Of every block that is coded, in order."""
    start = 0 if rows.embedding is None else 1

    few = slice(None, None, max(1, len(rows.blocks[0]) // SAMPLE))

    def one(block: int) -> _Model:
        y = rows.blocks[block][few]
        y = y - y.mean(0)
        width = y.shape[1]
        if not block:
            return _Model(torch.zeros(width, width), y.T @ y / len(y))
        present = [rows.blocks[block - 1], rows.embedding]
        x = torch.cat([t[few] for t in present if t is not None], 1)
        x = x - x.mean(0)
        found = regression(x.T @ x, x.T @ y, len(x))
        left = y - x @ found
        free = max(1, len(y) - x.shape[1])  # what the regression has learned by heart is no gain
        return _Model(found[:width], left.T @ left / free)

    return map_cores(one, range(start, len(rows.blocks)))


def _positive(eigenvalues: Tensor) -> Tensor:
    """Of a covariance, without what rounding made of its zeros."""
    return eigenvalues.clamp(min=max(1e-9 * float(eigenvalues.max()), 1e-30))


def _codes(eigenvalues: Tensor, level: float, code_bits: int) -> int:
    """Codes of a block at a water level: ½·log₂(λ/level) bits an axis, in whole codes."""
    bits = (0.5 * torch.log2(_positive(eigenvalues) / level)).clamp(min=0).sum()
    return round(float(bits) / code_bits)


def allocate(rows: Rows, cost: Cost, bits: float, code_bits: int) -> list[int]:
    """Codes a token of every block, at most `bits` a block on average, by reverse water-filling.

    Every axis is coded to the same error, the water
    level, or not at all; the level that spends the budget is found by bisection.
    """
    blocks = len(rows.blocks)
    models = list(_models(rows))
    start = blocks - len(models)
    roots, inverse = cost.root, cost.inverse

    def spent(level: float) -> list[int]:
        counts = [0] * start
        error = torch.zeros_like(roots[0])  # covariance of y − ŷ
        for block, model in enumerate(models, start):
            spread = model.step.T @ error @ model.step + model.noise
            values, axes = torch.linalg.eigh(roots[block] @ spread @ roots[block])
            counts.append(_codes(values, level, code_bits))
            back = axes.T @ inverse[block]
            left = values.clamp(min=0, max=level) if counts[-1] else values.clamp(min=0)
            error = back.T @ (left[:, None] * back)
        return counts

    tops = (
        float(torch.linalg.eigvalsh(root @ model.noise @ root).max())
        for root, model in zip(roots[start:], models, strict=True)
    )
    budget, best = bits * blocks, [0] * blocks
    high, spends = math.log2(max([*tops, 1e-30])) + 4, 0  # log2 of a level that spends nothing
    low, most = high - STRIDE, 0
    for _ in range(SEARCH):
        middle = low
        if most:  # found one that spends too much: nearly straight between the two
            part = (most - budget) / max(most - spends, 1)
            middle = low + (high - low) * min(max(part, 0.05), 0.95)
        counts = spent(2.0**middle)
        total = sum(counts) * code_bits
        if total > budget:
            low, most = middle, total
        else:
            high, spends, best = middle, total, counts
            low = low if most else low - STRIDE
        if sum(best) * code_bits > budget - code_bits:
            break
    return best


# Block by block.


def predictor(
    x: Tensor, y: Tensor, root: Tensor, inverse: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """squeeze, spread and offset: the best prediction of that rank, errors weighed by root².

    Reduced-rank regression (Izenman 1975): the regression in coordinates where every error costs
    the same, cut to the principal axes of what it predicts.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred
    full = regression(gram, centred.T @ ((y - mean_y) @ root), len(x))
    _, axes = torch.linalg.eigh(full.T @ gram @ full)
    axes = axes[:, -rank:]
    squeeze, spread = full @ axes, axes.T @ inverse
    return squeeze, spread, mean_y - mean_x @ squeeze @ spread


def dealt(bits: Tensor, codes: int) -> list[list[int]]:
    """Axes, most bits first, to `codes` groups that have about as many bits each."""
    groups: list[list[int]] = [[] for _ in range(codes)]
    held = [0.0] * codes
    for axis, share in enumerate(bits.tolist()):
        least = min(range(codes), key=held.__getitem__)
        groups[least].append(axis)
        held[least] += share
    return groups


def _level(values: Tensor, budget: float) -> Tensor:
    """½·log₂(λ/level) for the axes above the water level that spends `budget` bits."""
    logs = 0.5 * torch.log2(_positive(values))
    sums = logs.cumsum(0)
    counts = torch.arange(1, len(logs) + 1)
    levels = (sums - budget) / counts  # were the first n axes coded
    above = (logs > levels).nonzero()
    used = int(above[-1]) + 1 if len(above) else 1
    return logs[:used] - levels[used - 1]


def coder(
    missing: Tensor,
    root: Tensor,
    inverse: Tensor,
    codes: int,
    codewords: int,
    iterations: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """analysis, synthesis and tables for the errors [n, E] that the predictor leaves."""
    weighed = missing @ root
    values, axes = torch.linalg.eigh(weighed.T @ weighed / len(weighed))
    values, axes = values.flip(0), axes.flip(1)
    bits = _level(values, codes * (codewords - 1).bit_length())
    groups = dealt(bits, min(codes, len(bits)))
    width = max(map(len, groups))
    analysis = missing.new_zeros(missing.shape[1], len(groups), width)
    synthesis = missing.new_zeros(len(groups), width, missing.shape[1])
    to, back = root @ axes, axes.T @ inverse
    for group, chosen in enumerate(groups):
        analysis[:, group, : len(chosen)] = to[:, chosen]
        synthesis[group, : len(chosen)] = back[chosen]
    enough = slice(None, None, max(1, len(missing) // (MEMBERS * codewords)))
    coordinates = missing[enough] @ analysis.flatten(1)
    parts = coordinates.unflatten(-1, (len(groups), width)).split(1, 1)

    def cluster(numbered: tuple[int, Tensor]) -> Tensor:
        group, part = numbered
        return kmeans(part.contiguous(), codewords, iterations=iterations, seed=seed + group)

    tables = torch.cat(list(map_cores(cluster, list(enumerate(parts)))))
    return analysis.flatten(1), synthesis.flatten(0, 1), tables


def fit_blocks(
    rows: Rows,
    cost: Cost,
    counts: Sequence[int],
    *,
    codewords: int,
    rank: int,
    iterations: int,
    seed: int,
    progress: Callable[[int], None] = lambda block: None,
) -> tuple[Transform, ...]:
    """The code of every block, in turn: each is fitted on what the blocks before really left."""
    made: list[Transform] = []
    known = rows.known(made)
    for block, y in enumerate(rows.blocks):
        if block == 0 and known.reached == 0:
            made.append(Transform.zero_codes(y.shape[1], codewords))
        else:
            features = known.features()
            x = y.new_zeros(len(y), 0) if features is None else features[0]
            weights = cost.root[block], cost.inverse[block]
            squeeze, spread, offset = predictor(x, y, *weights, rank)
            left = y - (offset + x @ squeeze @ spread)
            parts = (squeeze, spread, offset)
            if counts[block]:
                place = seed + block * 1000
                coded = coder(left, *weights, counts[block], codewords, iterations, place)
            else:
                empty = Transform.zero_codes(y.shape[1], codewords)
                coded = empty.analysis, empty.synthesis, empty.tables
            made.append(Transform(*parts, *coded))
            words = nearest_codewords(made[block], left[None]) if counts[block] else None
            known.update(block, (y - left)[None], words)
        progress(block)
    return tuple(made)


def embedding_of(adapter: Adapter, inputs: Inputs) -> Tensor:
    """ê of a window, [1, T, D]."""
    with torch.inference_mode():
        return rms_normalized(adapter.embed(inputs))
