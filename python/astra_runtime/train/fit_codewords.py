"""Fitting codewords by k-means: of each block by itself, or of what the blocks before leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import astra_kernels as ak

from ..codes.base import Codec, geometry
from ..codes.codebook import Codebook
from ..codes.packed import PackedCodes
from ..models import Adapter
from ..parallel import map_cores
from .calibration import Progress, Recorded, record
from .kmeans import kmeans
from .options import FitData, FitOptions

DEFAULT_CODEWORDS = 1024
Tables = Iterator[tuple[Tensor, Tensor | None]]  # and scales, of each block in turn


@dataclass(frozen=True)
class CodewordOptions:
    """Of a fit by k-means, see `FitOptions` for what they mean."""

    groups: int
    codewords: int
    shared: bool
    prefix: int
    iterations: int
    seed: int

    @classmethod
    def of(cls, options: FitOptions, codec: type[Codec], adapter: Adapter) -> CodewordOptions:
        """Refuses, with a ValueError, what the model cannot be coded with."""
        if options.bits is not None or options.target_gap is not None or options.fine_bits:
            raise ValueError(
                "bits, target_gap, fine_bits: expected with space 'transform' only, "
                f"got space {options.space!r}"
            )
        prefix, sizes = options.prefix_for(codec, adapter), geometry(adapter)
        default = codec.shares_heads(options.groups, sizes)
        shared = default if options.shared is None else options.shared and codec.can_share_heads
        codec.check_groups(options.groups, shared, sizes)
        return cls(
            options.groups,
            options.codewords or DEFAULT_CODEWORDS,
            shared,
            prefix,
            options.iterations,
            options.seed,
        )

    @property
    def vectors_needed(self) -> int:
        return self.codewords


def fit_codewords(data: FitData, options: CodewordOptions) -> Codebook:
    """Each block's codewords are those of its own vectors."""
    return _fit(data, options, _clustered)


def fit_closed_loop(data: FitData, options: CodewordOptions) -> Codebook:
    """Each block's codewords are those of what the codes of the blocks before left to code."""
    return _fit(data, options, _closed_loop)


def _fit(
    data: FitData,
    options: CodewordOptions,
    cluster: Callable[[Recorded, type[PackedCodes], CodewordOptions], Tables],
) -> Codebook:
    codec, adapter = data.codec, data.adapter
    assert issubclass(codec, PackedCodes)
    recorded = record(adapter, codec.early, data.windows, data.progress, options.prefix)
    blocks = cluster(recorded, codec, options)
    tables, scales = _stacked(blocks, len(adapter.blocks), data.progress)
    codebook = Codebook(
        codec.key,
        options.groups,
        options.codewords,
        options.shared,
        tables=tables,
        scales=scales,
        prefix=options.prefix,
        geometry=geometry(adapter),
        model=adapter.checkpoint(),
        notes={
            "calibration_vectors": data.vectors,
            "iterations": options.iterations,
            "seed": options.seed,
        },
    )
    if data.evaluate is not None:
        codebook.notes["held_back"] = data.evaluate(codebook)
    return codebook


def _clustered(recorded: Recorded, codec: type[PackedCodes], options: CodewordOptions) -> Tables:
    def cluster(block: int) -> tuple[Tensor, Tensor | None]:
        vectors, scales = recorded.vectors(codec, block, options.groups, options.shared)
        seed = options.seed + block
        table = kmeans(vectors, options.codewords, iterations=options.iterations, seed=seed)
        return table, scales

    return map_cores(cluster, range(len(recorded.adapter.blocks)))


def _closed_loop(recorded: Recorded, codec: type[PackedCodes], options: CodewordOptions) -> Tables:
    groups, codewords = options.groups, options.codewords

    def cluster(group: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Codewords [1, K, w] of a group of channels, and what they add to its estimates."""
        seed, vectors = group
        table = kmeans(vectors, codewords, iterations=options.iterations, seed=seed)
        return table, ak.decode(ak.encode(vectors, table), table)

    # block 0's are the embeddings, known everywhere
    estimate, scales = recorded.vectors(codec, 0, groups, False)
    yield estimate.new_zeros(groups, codewords, estimate.shape[-1]), scales
    for block in range(1, len(recorded.adapter.blocks)):
        vectors, scales = recorded.vectors(codec, block, groups, False)
        missing = [part.contiguous() for part in (vectors - estimate).split(1, 1)]
        clustered = map_cores(cluster, enumerate(missing, options.seed + block * groups))
        tables, steps = zip(*clustered, strict=True)
        estimate += torch.cat(steps, 1)
        yield torch.cat(tables), scales


def _stacked(of_blocks: Tables, blocks: int, progress: Progress) -> tuple[Tensor, Tensor | None]:
    """Tables and scales of all blocks; `progress` is told of each."""
    tables, scales = [], []
    progress("clustering", 0, blocks)
    for block, (table, scale) in enumerate(of_blocks):
        tables.append(table)
        if scale is not None:
            scales.append(scale)
        progress("clustering", block + 1, blocks)
    return torch.stack(tables).cpu(), torch.stack(scales).cpu() if scales else None
