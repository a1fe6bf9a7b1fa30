"""Searching wide codewords in few dimensions: nearly the nearest of many, for a fraction.

A thousand codewords of 768 channels differ mostly along few axes, the principal ones of the
codewords themselves. With m their mean and U the r axes along which they differ most,

    argmin_k ‖x − c_k‖² ≈ argmin_k ‖Uᵀ(x − m) − Uᵀ(c_k − m)‖²,

and a search of K codewords of w channels, K·w multiplications, becomes w·r + K·r. Codewords stay as
wide as they are, so whoever looks one up gets all of it; only the choice among near ones is less
than exact. (Codewords that lie in the subspace themselves are no substitute: what they lack is the
same in every codeword, and adds up.)
"""

from __future__ import annotations

import torch
from torch import Tensor

import astra_kernels as ak
from astra_kernels import _direct as direct

DIMENSIONS = 64


def search_dimensions(codewords: int, width: int) -> int:
    """r: `DIMENSIONS` where they halve the search at least, else 0: all channels."""
    few = DIMENSIONS * (codewords + width)
    return DIMENSIONS if 2 * few <= codewords * width and width > DIMENSIONS else 0


def search_macs(codewords: int, width: int) -> int:
    """Multiplications to find a vector's codeword among K of `width` channels."""
    dimensions = search_dimensions(codewords, width)
    return dimensions * (codewords + width) if dimensions else codewords * width


class Search:
    """Codes of vectors, by tables fp32 [C, K, w]; `dimensions`: r, 0 for all, None by default.

    `dtype`: what codewords and vectors are rounded to for the search. A GPU multiplies 16-bit
    numbers exactly, at many times the speed; of the rounded codewords the nearest is found.
    """

    def __init__(
        self,
        tables: Tensor,
        dimensions: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _, codewords, width = tables.shape
        self.tables, self.axes, self.half_norms = tables, None, None
        if dimensions is None:
            dimensions = search_dimensions(codewords, width)
        if dimensions:
            mean = tables.mean(1, keepdim=True)  # [C, 1, w]
            centered = tables - mean
            _, axes = torch.linalg.eigh(centered.transpose(1, 2) @ centered)  # ascending
            self.axes = axes[..., -dimensions:].contiguous()  # [C, w, r]
            self.shift = -(mean @ self.axes)
            self.tables = (centered @ self.axes).contiguous()
        self.tables = self.tables.to(dtype)
        if self.tables.device.type != "cpu":
            self.half_norms = self.tables.float().square().sum(-1) / 2

    def __call__(self, vectors: Tensor) -> Tensor:
        """int32 [..., C] of vectors [..., C, w]."""
        return direct.encode(self._coordinates(vectors), self.tables, self.half_norms)

    def packed(self, vectors: Tensor, bits: int) -> Tensor:
        """The codes of vectors [B, T, C, w] as they are sent, uint8 [B, bytes]."""
        given = self._coordinates(vectors)
        return ak.encode_packed(given, self.tables, bits, half_norms=self.half_norms)

    def _coordinates(self, vectors: Tensor) -> Tensor:
        """[..., C, r] of vectors [..., C, w]."""
        if self.axes is None:
            return vectors.to(self.tables.dtype)
        vectors = vectors.float()
        flat = vectors.reshape(-1, *vectors.shape[-2:]).transpose(0, 1)
        coordinates = torch.baddbmm(self.shift, flat, self.axes).transpose(0, 1)
        coordinates = coordinates.to(self.tables.dtype).contiguous()
        return coordinates.view(*vectors.shape[:-1], -1)
