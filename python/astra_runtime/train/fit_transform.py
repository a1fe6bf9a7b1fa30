"""Fitting predictive transform codes: what an error costs, where bits go, then block by block.

The formulas are those of `codes/predictive.py`. Three steps:

1. `sensitivity.py`: F of every block, from gradients of the model's own, sampled answers by the
   keys and values that other ranks see. Two backward passes' worth of work a window.
2. `allocate`: codes a block, by reverse water-filling on the Gaussian model that linear regression
   of one block's keys and values on the last one's gives (a Kalman filter's covariances).
3. `fit_blocks`: predictor, axes and codewords of each block in turn, on what the blocks before
   really leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..codes.fine import FineCode
from ..codes.predictive import Transform, nearest_codewords, rms_normalized
from ..models import Adapter, Inputs
from ..parallel import map_cores
from .kmeans import kmeans
from .linear import Centred, LinearModel, Rows, known_features, regression
from .sensitivity import Cost

SEARCH = 24  # steps towards the water level, at most
STRIDE = 1.0  # the first one, in its log2: half a bit on every axis
LEFT = 0.01  # of the budget, that the search may leave
MEMBERS = 64  # vectors a codeword that k-means sees: more cost time and change little
# Vectors a codeword that its iterations before the last two see, in turns; and how many turns.
MEMBERS_AT_FIRST, TURNS = 16, 3
ROUNDS = 3  # of drawing codewords to start with
TOGETHER = 4  # groups whose k-means run as one


def _positive(eigenvalues: Tensor) -> Tensor:
    """Of a covariance, without what rounding made of its zeros."""
    return eigenvalues.clamp(min=max(1e-9 * float(eigenvalues.max()), 1e-30))


def _bits(eigenvalues: Tensor, level: float) -> float:
    """Of a block at a water level: ½·log₂(λ/level) an axis."""
    return float((0.5 * torch.log2(_positive(eigenvalues) / level)).clamp(min=0).sum())


def _codes(eigenvalues: Tensor, level: float, code_bits: int) -> int:
    """Codes of a block at a water level, in whole ones."""
    return round(_bits(eigenvalues, level) / code_bits)


def allocate(
    models: Sequence[LinearModel],
    cost: Cost,
    bits: float,
    code_bits: int,
    progress: Callable[[int], None] = lambda step: None,
) -> list[int]:
    """Codes a token of every block, at most `bits` a block on average, by reverse water-filling.

    `models`: of every block that is coded, the last of all.

    Every axis is coded to the same error, the water level, or not at all; the level that spends
    nearly the whole budget is found in a few steps. The rest goes to the blocks that rounding to
    whole codes took most from. `progress` hears of the steps towards the level, SEARCH at most.
    """
    roots, inverse = cost.root, cost.inverse
    blocks = len(roots)
    start = blocks - len(models)

    def spent(level: float) -> list[float]:
        """Codes of every block, before they are rounded."""
        wanted = [0.0] * start
        error = torch.zeros_like(roots[0])  # covariance of y − ŷ
        for block, model in enumerate(models, start):
            spread = model.step.T @ error @ model.step + model.noise
            values, axes = torch.linalg.eigh(roots[block] @ spread @ roots[block])
            wanted.append(_bits(values, level) / code_bits)
            back = axes.T @ inverse[block]
            errors = values.clamp(min=0, max=level) if round(wanted[-1]) else values.clamp(min=0)
            error = back.T @ (errors[:, None] * back)
        return wanted

    spectra = [
        torch.linalg.eigvalsh(root @ model.noise @ root)
        for root, model in zip(roots[start:], models, strict=True)
    ]
    budget, best, spends = bits * blocks, [0.0] * blocks, 0
    allowed = max(code_bits, LEFT * budget)
    # Levels, in log2: one that spends too much, one that does not, and the last one tried. Errors
    # that the blocks before leave cost more bits, so the search begins where there are none.
    low, high = -math.inf, math.inf
    middle, last, before = _level_of(spectra, budget), math.inf, 0
    for step in range(SEARCH):
        progress(step)
        wanted = spent(2.0**middle)
        total = sum(map(round, wanted)) * code_bits
        if total > budget:
            low = middle
        else:
            high, spends, best = middle, total, wanted
        if budget - spends < allowed:
            break
        rise = (total - before) / (middle - last)  # between the last two it is nearly straight
        last, before = middle, total
        if rise < 0:
            middle += (budget - allowed / 2 - total) / rise
        if rise >= 0 or not low < middle < high:
            middle = _between(low, high)
    progress(SEARCH)
    return _rounded(best, int(budget // code_bits))


def _level_of(spectra: Sequence[Tensor], budget: float) -> float:
    """log2 of the level at which axes of these variances take `budget` bits in all."""
    high = math.log2(max([float(values.max()) for values in spectra] + [1e-30])) + 1
    low = high - 60
    for _ in range(40):
        middle = (low + high) / 2
        if sum(_bits(values, 2.0**middle) for values in spectra) > budget:
            low = middle
        else:
            high = middle
    return high


def _between(low: float, high: float) -> float:
    """A level to try next; where one of the two is infinite, beyond the other."""
    if math.isinf(high):
        return low + STRIDE
    return high - STRIDE if math.isinf(low) else (low + high) / 2


def _rounded(wanted: Sequence[float], most: int) -> list[int]:
    """Whole codes, at most `most` in all: one more each where rounding took most away, if some are
    left."""
    counts = [round(codes) for codes in wanted]
    order = sorted(range(len(counts)), key=lambda block: counts[block] - wanted[block])
    for block in order[: max(0, most - sum(counts))]:
        counts[block] += wanted[block] > 0
    return counts


def past_first(counts: Sequence[int]) -> list[int]:
    """The same codes in block 1 where block 0 would have them all.

    What few bits say of a lone token, before it has seen its neighbours, is lost on the blocks
    behind: a ViT adapted to 5 bits a token was 11 points better with them in block 1.
    """
    if len(counts) == 1 or any(counts[1:]):
        return list(counts)
    return [0, counts[0], *counts[2:]]


def predictor(
    x: Centred, y: Tensor, root: Tensor, inverse: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Low-rank factors and offset: the best prediction of that rank, errors weighed by root².

    Reduced-rank regression (Izenman 1975): the regression in coordinates where every error costs
    the same, cut to the principal axes of what it predicts.
    """
    mean = y.mean(0)
    full = regression(x.gram, x.cross(y - mean) @ root, len(y))
    _, axes = torch.linalg.eigh(full.T @ x.gram @ full)
    axes = axes[:, -rank:]
    down, up = full @ axes, axes.T @ inverse
    return down, up, mean - x.mean @ down @ up


def balanced_groups(bits: Tensor, codes: int) -> list[list[int]]:
    """Axes, most bits first, to `codes` groups that have about as many bits each."""
    groups: list[list[int]] = [[] for _ in range(codes)]
    totals = [0.0] * codes
    for axis, share in enumerate(bits.tolist()):
        least = min(range(codes), key=totals.__getitem__)
        groups[least].append(axis)
        totals[least] += share
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


def fit_quantizer(
    missing: Tensor,
    root: Tensor,
    inverse: Tensor,
    codes: int,
    codewords: int,
    iterations: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """analysis, synthesis and tables for the errors [n, E] that the predictor leaves."""
    values, axes = torch.linalg.eigh(root @ _covariance(missing) @ root)
    values, axes = values.flip(0), axes.flip(1)
    bits = _level(values, codes * (codewords - 1).bit_length())
    groups = balanced_groups(bits, min(codes, len(bits)))
    width = max(map(len, groups))
    analysis = missing.new_zeros(missing.shape[1], len(groups), width)
    synthesis = missing.new_zeros(len(groups), width, missing.shape[1])
    to, back = root @ axes, axes.T @ inverse
    for group, chosen in enumerate(groups):
        analysis[:, group, : len(chosen)] = to[:, chosen]
        synthesis[group, : len(chosen)] = back[chosen]
    enough = slice(None, None, max(1, len(missing) // (MEMBERS * codewords)))
    coordinates = missing[enough] @ analysis.flatten(1)
    parts = coordinates.unflatten(-1, (len(groups), width)).split(TOGETHER, 1)
    thin = min(TURNS, max(1, len(coordinates) // (MEMBERS_AT_FIRST * codewords)))

    def cluster(numbered: tuple[int, Tensor]) -> Tensor:
        number, part = numbered
        return kmeans(
            part.contiguous(),
            codewords,
            iterations=iterations,
            seed=seed + number,
            thin=thin,
            rounds=ROUNDS,
        )

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
    kept: int = 0,
    progress: Callable[[int], None] = lambda block: None,
) -> tuple[tuple[Transform, ...], list[Tensor | None]]:
    """The code of every block, in turn: each is fitted on what the blocks before really left.

    And what it leaves itself, y − ŷ, of `kept` evenly spaced tokens, or of all where these are
    fewer; None of blocks that send nothing, or where `kept` is 0.
    """
    transforms: list[Transform] = []
    errors: list[Tensor | None] = []
    tokens = len(rows.blocks[0])
    count = min(kept, tokens)
    few = torch.arange(count, device=rows.blocks[0].device) * tokens // max(1, count)
    embedding = None if rows.embedding is None else Centred.of(rows.embedding)
    estimate: Tensor | None = None  # ŷ of the block before
    for block, y in enumerate(rows.blocks):
        if block == 0 and rows.starts_exact:
            transforms.append(Transform.zero_codes(y.shape[1], codewords))
            errors.append(None)
            estimate = y
        else:
            x = known_features(estimate, embedding, y)
            weights = cost.root[block], cost.inverse[block]
            down, up, offset = predictor(x, y, *weights, rank)
            estimate = offset + (x.mean @ down + x.product(down)) @ up
            parts = (down, up, offset)
            residual = y - estimate
            if counts[block]:
                place = seed + block * 1000
                coded = fit_quantizer(
                    residual, *weights, counts[block], codewords, iterations, place
                )
            else:
                empty = Transform.zero_codes(y.shape[1], codewords)
                coded = empty.analysis, empty.synthesis, empty.tables
            transforms.append(Transform(*parts, *coded))
            if counts[block]:
                transform = transforms[-1]
                estimate = estimate + transform.synthesize(nearest_codewords(transform, residual))
            left = counts[block] and kept
            errors.append(y[few] - estimate[few] if left else None)
        progress(block)
    return tuple(transforms), errors


def fit_fine(
    errors: Sequence[Tensor | None],
    cost: Cost,
    bits: float,
    *,
    codewords: int,
    iterations: int,
    seed: int,
    progress: Callable[[int], None] = lambda block: None,
) -> tuple[FineCode, ...]:
    """Fine codes of every block that sends something, at most `bits` a token and block on average.

    Fitted on `errors`, those of `fit_blocks`: of all tokens, as any may stand before a cut.
    """
    code_bits = (codewords - 1).bit_length()
    spectra = [
        None if error is None else torch.linalg.eigvalsh(root @ _covariance(error) @ root).flip(0)
        for error, root in zip(errors, cost.root, strict=True)
    ]
    counts = _within(spectra, bits * len(spectra), code_bits)
    made: list[FineCode] = []
    for block, error in enumerate(errors):
        if error is None or not counts[block]:
            made.append(FineCode.zero_codes(len(cost.root[block]), codewords))
        else:
            weights, place = (cost.root[block], cost.inverse[block]), seed + block * 1000 + 500
            parts = fit_quantizer(error, *weights, counts[block], codewords, iterations, place)
            made.append(FineCode(*parts))
        progress(block)
    return tuple(made)


def _covariance(centred: Tensor) -> Tensor:
    return centred.T @ centred / len(centred)


def _within(spectra: Sequence[Tensor | None], budget: float, code_bits: int) -> list[int]:
    """Codes a token of blocks with these error variances, by one water level for all."""
    present = [s for s in spectra if s is not None]
    if not present:
        return [0] * len(spectra)
    high = math.log2(max(float(s[0]) for s in present)) + 1
    low, best = high - 60, [0] * len(spectra)
    for _ in range(40):
        middle = (low + high) / 2
        counts = [0 if s is None else _codes(s, 2.0**middle, code_bits) for s in spectra]
        if sum(counts) * code_bits > budget:
            low = middle
        else:
            high, best = middle, counts
    return best


def embedding_of(adapter: Adapter, inputs: Inputs) -> Tensor:
    """ê of a window, [1, T, D]."""
    with torch.inference_mode():
        return rms_normalized(adapter.embed(inputs))
