"""Nearest codeword on a CPU: narrow groups in C++, wide ones by torch's matmul.

Up to NATIVE_WIDTH channels the C++ loop, which never writes a score, is 5 to 7 times quicker;
beyond, BLAS makes better use of the caches (`bench/ops.py`). There it is one matmul for a tile of
rows, then argmin while it is in cache. torch's argmin reads 1.4 ns an element, several times what
the matmul of a narrow group costs; its amin is vectorized. So minima of blocks are taken first, and
argmin sees one block a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels.encode import native

# Scores of one tile: 2^19 fp32 are 2 MiB. Smaller tiles fit L2 but pay more calls; fewer rows than
# MIN_ROWS waste the matmul (bench/ops.py, case `encode_tile`).
NATIVE_WIDTH = 96
TILE = 1 << 19
MIN_ROWS = 64
BLOCK = 64


def encode(vectors: Tensor, codebook: Tensor, half_norms: Tensor | None = None) -> Tensor:
    """argmin_k ||x - c_k||^2 = argmin_k ||c_k||^2 / 2 - x.c_k"""
    groups, codewords, width = codebook.shape
    if not vectors.numel():  # of no channels all codewords are equal: the lowest index
        return vectors.new_zeros(vectors.shape[:-1], dtype=torch.int32)
    double = torch.float64 in (vectors.dtype, codebook.dtype)
    if width <= NATIVE_WIDTH and not double:
        return native.encode(vectors, codebook)
    dtype = torch.float64 if double else torch.float32
    codebook = codebook.to(dtype)
    rows = vectors.reshape(-1, groups, width).to(dtype)
    if half_norms is None:
        half_norms = codebook.square().sum(dim=-1).mul_(0.5)
    half_norms = half_norms.to(dtype)
    count = rows.shape[0]
    tile = max(1, min(count, max(MIN_ROWS, TILE // codewords)))
    scores = torch.empty(tile, codewords, dtype=dtype, device="cpu")
    codes = torch.empty(count, groups, dtype=torch.int32, device="cpu")
    for group in range(groups):
        table = codebook[group]
        for start in range(0, count, tile):
            part = rows[start : start + tile, group]
            tile_scores = scores[: part.shape[0]]
            torch.addmm(half_norms[group], part, table.t(), alpha=-1, out=tile_scores)
            best, index = _argmin(tile_scores)
            if not best.sum().isfinite():
                index = _nearest_of_any(part, table)
            codes[start : start + tile, group] = index
        lowest = _lowest_equal(table, half_norms[group])
        if lowest is not None:
            codes[:, group] = lowest[codes[:, group]]
    return codes.view(vectors.shape[:-1])


def _argmin(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest score of each row and the lowest index that has it."""
    rows, codewords = scores.shape
    if codewords % BLOCK != 0 or codewords == BLOCK:
        best, index = scores.min(dim=1)
        return best, index
    blocks = scores.view(rows, codewords // BLOCK, BLOCK)
    best, block = blocks.amin(dim=2).min(dim=1)
    places = block.view(rows, 1, 1).expand(rows, 1, BLOCK)
    within = blocks.gather(1, places).squeeze(1).argmin(dim=1)
    return best, within.add_(block, alpha=BLOCK)


def _lowest_equal(table: Tensor, half_norms: Tensor) -> Tensor | None:
    """For every codeword the lowest index of an equal one, int32 [K]; None where all differ.

    BLAS may round the products of equal codewords differently.
    """
    norms, order = half_norms.sort(stable=True)
    repeated = norms[1:] == norms[:-1]
    if not repeated.any():
        return None
    lowest = torch.arange(len(table), dtype=torch.int32, device="cpu")
    no, yes = norms.new_zeros(1, dtype=torch.bool), repeated
    rows = order[torch.cat((yes, no)) | torch.cat((no, yes))].sort().values
    _, inverse = torch.unique(table[rows], dim=0, return_inverse=True)
    first = torch.full((len(rows),), len(table), device="cpu").scatter_reduce_(
        0, inverse, rows, "amin"
    )
    lowest[rows] = first[inverse].to(torch.int32)
    return lowest


def _nearest_of_any(rows: Tensor, table: Tensor) -> Tensor:
    """The same where NaN or infinity occurs: such a distance counts as infinite."""
    distances = torch.stack([(table - row).square().sum(dim=-1) for row in rows])
    return distances.nan_to_num(nan=float("inf"), posinf=float("inf")).argmin(dim=1)
