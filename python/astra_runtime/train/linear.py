"""What is linear of keys, values and embeddings: regressions block by block, and a basis for all.

A codec's bits and its basis of embeddings follow from these before anything is coded
(`fit_transform.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel import map_cores

RIDGE = 3e-3  # of the features' own variance, in regressions
SAMPLE = 8192  # rows are enough to tell where bits go


@dataclass(frozen=True, eq=False)
class Centred:
    """Rows x [n, F] without their mean, in parts that stand side by side.

    Attributes:
        gram: xᵀx, [F, F]. Of the embeddings it is made once, for the regressions of all blocks.
    """

    parts: tuple[Tensor, ...]
    mean: Tensor
    gram: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Centred:
        mean = rows.mean(0)
        rows = rows - mean
        return cls((rows,), mean, rows.T @ rows)

    def beside(self, other: Centred) -> Centred:
        across = self.cross(other.parts[0])
        above, below = torch.cat([self.gram, across], 1), torch.cat([across.T, other.gram], 1)
        mean = torch.cat([self.mean, other.mean])
        return Centred(self.parts + other.parts, mean, torch.cat([above, below]))

    def cross(self, y: Tensor) -> Tensor:
        """xᵀy, [F, E]."""
        return torch.cat([part.T @ y for part in self.parts])

    def product(self, weights: Tensor) -> Tensor:
        """x·weights, [n, E], of weights [F, E]."""
        shares = weights.split([part.shape[1] for part in self.parts])
        first, *others = (part @ share for part, share in zip(self.parts, shares, strict=True))
        return sum(others, first)


@dataclass(eq=False)
class Rows:
    """Calibration tokens, side by side: y of a block [n, E], and what every rank knows at once."""

    blocks: list[Tensor]
    embedding: Tensor | None

    @property
    def starts_exact(self) -> bool:
        """Whether every rank computes block 0 itself, from the token ids."""
        return self.embedding is not None

    def few(self, count: int) -> Rows:
        """Evenly spaced tokens, `count` or up to twice as many."""
        few = slice(None, None, max(1, len(self.blocks[0]) // count))
        embedding = None if self.embedding is None else self.embedding[few]
        return Rows([block[few] for block in self.blocks], embedding)

    def in_basis(self, basis: Tensor) -> Rows:
        """The same with the coordinates of ê in a basis [D, F]."""
        assert self.embedding is not None, "there is nothing to project"
        return Rows(self.blocks, self.embedding @ basis)

    def features(self, estimate: Tensor | None) -> Tensor:
        """[ŷ of the block before, ê], [n, F]; F is 0 where there is neither."""
        present = [t for t in (estimate, self.embedding) if t is not None]
        return (
            torch.cat(present, 1) if present else self.blocks[0].new_zeros(len(self.blocks[0]), 0)
        )


def regression(gram: Tensor, cross: Tensor, count: int) -> Tensor:
    """Ridge regression of `count` centred rows x on y: [F, E], from xᵀx and xᵀy."""
    raised = gram.clone()
    raised.diagonal().mul_(1 + RIDGE).add_(1e-6 * count)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(raised))


def known_features(estimate: Tensor | None, embedding: Centred | None, rows: Tensor) -> Centred:
    """ŷ of the block before and ê, as far as there are such, of the same tokens as `rows`."""
    if estimate is None:
        return embedding or Centred.of(rows[:, :0])
    of_estimate = Centred.of(estimate)
    return of_estimate if embedding is None else of_estimate.beside(embedding)


@dataclass(eq=False)
class LinearModel:
    """A block's y as a linear function of the last block's, plus ê, plus noise.

    Attributes:
        step: [E, E], what an error of the last block becomes; noise: [E, E], covariance.
        embedding: [D, E], what ê adds; D is 0 where there is none.
    """

    step: Tensor
    noise: Tensor
    embedding: Tensor


def linear_models(rows: Rows) -> Iterator[LinearModel]:
    """Of every block that is coded, in order."""
    start = 0 if rows.embedding is None else 1

    few = slice(None, None, -(-len(rows.blocks[0]) // SAMPLE))
    embedding = None if rows.embedding is None else Centred.of(rows.embedding[few])

    def one(block: int) -> LinearModel:
        y = rows.blocks[block][few]
        y = y - y.mean(0)
        width = y.shape[1]
        if not block:
            return LinearModel(y.new_zeros(width, width), y.T @ y / len(y), y.new_zeros(0, width))
        x = known_features(rows.blocks[block - 1][few], embedding, y)
        cross = x.cross(y)
        weights = regression(x.gram, cross, len(y))
        predicted = weights.T @ cross
        # of what is left: (y − x·weights)ᵀ(y − x·weights), without x·weights
        left = y.T @ y - predicted - predicted.T + weights.T @ (x.gram @ weights)
        free = max(1, len(y) - len(weights))  # what the regression has learned by heart is no gain
        return LinearModel(weights[:width], left / free, weights[width:])

    return map_cores(one, range(start, len(rows.blocks)))


def shared_basis(rows: Rows, models: Sequence[LinearModel], root: Tensor, count: int) -> Tensor:
    """[D, count], coordinates of ê that serve the predictors of all blocks.

    The regressions of all blocks side by side, errors weighed by root² [L, E, E], are cut to the
    principal axes of what ê adds to all of them: one reduced-rank regression.
    """
    assert rows.embedding is not None, "there is nothing to make a basis of"
    centred = rows.embedding - rows.embedding.mean(0)
    values, axes = torch.linalg.eigh((centred.T @ centred / len(centred)).double())
    spread = values.clamp(min=1e-6 * float(values.max())).sqrt()
    half, back = (axes * spread) @ axes.T, (axes / spread) @ axes.T
    added = torch.zeros_like(half)
    for model, weight in zip(models, root[-len(models) :], strict=True):
        weighed = (model.embedding @ weight).double()
        added += weighed @ weighed.T
    _, principal = torch.linalg.eigh(half @ added @ half)
    return (back @ principal[:, -count:]).float()
