"""Codewords in few dimensions: how the nearest of many is found for less than it looks.

A thousand codewords of 768 channels, fitted to some ten thousand vectors, spread along few axes;
the rest is noise of the fit. So they are sought in the r principal axes of the vectors, and a
vector x is coded by its coordinates there. With codewords c = m + U·z, U orthonormal,

    ‖x − c‖² = ‖(1 − UUᵀ)(x − m)‖² + ‖Uᵀ(x − m) − z‖²,

whose first term is the same for every codeword: the search of K codewords of w channels, K·w
multiplications, becomes w·r + K·r and finds the same one. Receivers look codewords up, as ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import astra_kernels as ak

DIMENSIONS = 64  # what a fit takes where nobody says how many


def search_macs(codewords: int, width: int, dimensions: int) -> int:
    """Multiplications to find a vector's nearest of K codewords of `width` channels."""
    return dimensions * (codewords + width) if dimensions else codewords * width


def default_dimensions(codewords: int, width: int) -> int:
    """`DIMENSIONS` where they save a quarter of the search at least, else 0: all."""
    saves = search_macs(codewords, width, DIMENSIONS) <= 0.75 * codewords * width
    return DIMENSIONS if saves and width > DIMENSIONS else 0


@dataclass(frozen=True)
class Subspace:
    """Affine subspaces, one a group: points mean + axes·z.

    Attributes:
        mean: fp32 [C, 1, w].
        axes: fp32 [C, w, r], orthonormal columns.
    """

    mean: Tensor
    axes: Tensor

    @classmethod
    def principal(cls, vectors: Tensor, dimensions: int) -> Subspace:
        """The mean and principal axes of vectors [n, C, w]."""
        groups = vectors.transpose(0, 1)
        mean = groups.mean(1, keepdim=True)
        centered = groups - mean
        _, axes = torch.linalg.eigh(centered.transpose(1, 2) @ centered)  # ascending
        return cls(mean, axes[..., -dimensions:].contiguous())

    def coordinates(self, vectors: Tensor) -> Tensor:
        """Uᵀ(x − m), [n, C, r], of vectors [n, C, w]."""
        groups = torch.baddbmm(-(self.mean @ self.axes), vectors.transpose(0, 1), self.axes)
        return groups.transpose(0, 1).contiguous()

    def points(self, coordinates: Tensor) -> Tensor:
        """m + U·z, [C, K, w], of coordinates [C, K, r]."""
        return self.mean + coordinates @ self.axes.transpose(1, 2)


class Search:
    """Nearest codewords of tables [C, K, w] that lie in subspaces of `dimensions`; 0: anywhere."""

    def __init__(self, tables: Tensor, dimensions: int = 0) -> None:
        self.tables = tables
        self.subspace = None
        if dimensions:
            self.subspace = Subspace.principal(tables.transpose(0, 1), dimensions)
            self.tables = self.subspace.coordinates(tables.transpose(0, 1)).transpose(0, 1)
            self.tables = self.tables.contiguous()

    def __call__(self, vectors: Tensor) -> Tensor:
        """Codes int32 [..., C] of vectors [..., C, w]."""
        if self.subspace is None:
            return ak.encode(vectors, self.tables)
        flat = vectors.reshape(-1, *vectors.shape[-2:])
        codes = ak.encode(self.subspace.coordinates(flat), self.tables)
        return codes.view(vectors.shape[:-1])
