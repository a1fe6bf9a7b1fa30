"""What is linear of keys, values and embeddings: regressions block by block, and a basis for all.

A codec's bits and its basis of embeddings follow from these before anything is coded
(`fit_transform.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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

    def in_basis(self, basis: Tensor) -> Rows:
        """The same with the coordinates of ê in a basis [D, F]."""
        assert self.embedding is not None, "there is nothing to project"
        return Rows(self.blocks, self.embedding @ basis)


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


@dataclass(frozen=True, eq=False)
class Products:
    """Sums over tokens of products of what `Rows` has, each centred: all that regressions need.

    Every product is made once, although most stand in the regressions of two blocks.

    Attributes:
        count: of tokens.
        own: yᵀy of every block, [E, E]; after: y′ᵀy of every block but the first, y′ that of the
            block before.
        embedding: êᵀê, [D, D], and mixed: êᵀy of every block, [D, E]; None and empty without ê.
    """

    count: int
    own: list[Tensor]
    after: list[Tensor]
    embedding: Tensor | None
    mixed: list[Tensor]

    @classmethod
    def of(cls, rows: Rows) -> Products:
        """Of evenly spaced tokens, SAMPLE at most."""
        few = _evenly_spaced(rows)

        def one(block: int) -> tuple[Tensor, Tensor | None]:
            y = _centred(rows.blocks[block][few])
            return y.T @ y, _centred(rows.blocks[block - 1][few]).T @ y if block else None

        own, after = zip(*map_cores(one, range(len(rows.blocks))), strict=True)
        made = cls(len(rows.blocks[0][few]), list(own), list(after[1:]), None, [])
        return made if rows.embedding is None else made.with_embedding(rows)

    def with_embedding(self, rows: Rows) -> Products:
        """The same with the products of these rows' ê.

        What `Rows.in_basis` has is multiplied anew: a basis enlarges directions in which ê hardly
        varies, and with them the rounding of products that were made before.
        """
        assert rows.embedding is not None, "there is nothing to multiply"
        few = _evenly_spaced(rows)
        known = _centred(rows.embedding[few])
        mixed = list(map_cores(lambda y: known.T @ _centred(y[few]), rows.blocks))
        return replace(self, embedding=known.T @ known, mixed=mixed)


def _evenly_spaced(rows: Rows) -> slice:
    return slice(None, None, -(-len(rows.blocks[0]) // SAMPLE))


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)


def linear_models(products: Products) -> Iterator[LinearModel]:
    """Of every block that is coded, in order."""
    start = 0 if products.embedding is None else 1

    def one(block: int) -> LinearModel:
        own = products.own[block]
        width = len(own)
        if not block:
            return LinearModel(torch.zeros_like(own), own / products.count, own[:0])
        gram, cross = products.own[block - 1], products.after[block - 1]
        if products.embedding is not None:
            across, mixed = products.mixed[block - 1], products.mixed[block]
            above = torch.cat([gram, across.T], 1)
            gram = torch.cat([above, torch.cat([across, products.embedding], 1)])
            cross = torch.cat([cross, mixed])
        weights = regression(gram, cross, products.count)
        predicted = weights.T @ cross
        # of what is left: (y − x·weights)ᵀ(y − x·weights), without x·weights
        left = own - predicted - predicted.T + weights.T @ (gram @ weights)
        # what the regression has learned by heart is no gain
        free = max(1, products.count - len(weights))
        return LinearModel(weights[:width], left / free, weights[width:])

    return map_cores(one, range(start, len(products.own)))


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
