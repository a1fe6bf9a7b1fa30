"""Fitting codewords by k-means: of each block by itself, or of what the blocks before leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

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
MEASURED = 4096  # vectors of a block, of those that the codewords are fitted to


class Clustered(NamedTuple):
    """What was found for a block.

    Attributes:
        table: [C, K, w]. scales: [Hkv, 2], or None.
        left_out: the share of the vectors' energy that codewords leave out.
    """

    table: Tensor
    scales: Tensor | None
    left_out: float


Tables = Iterator[Clustered]  # of each block in turn


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
    tables, scales, left_out = _stacked(blocks, len(adapter.blocks), data.progress)
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
    ).with_left_out(left_out)
    if data.evaluate is not None:
        codebook.notes["held_back"] = data.evaluate(codebook)
    return codebook


def _clustered(recorded: Recorded, codec: type[PackedCodes], options: CodewordOptions) -> Tables:
    def cluster(block: int) -> Clustered:
        vectors, scales = recorded.vectors(codec, block, options.groups, options.shared)
        seed = options.seed + block
        table = kmeans(vectors, options.codewords, iterations=options.iterations, seed=seed)
        some = vectors[:: -(-len(vectors) // MEASURED)]
        return Clustered(table, scales, _left_out(some, ak.decode(ak.encode(some, table), table)))

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
    yield Clustered(estimate.new_zeros(groups, codewords, estimate.shape[-1]), scales, 0.0)
    for block in range(1, len(recorded.adapter.blocks)):
        vectors, scales = recorded.vectors(codec, block, groups, False)
        missing = [part.contiguous() for part in (vectors - estimate).split(1, 1)]
        clustered = map_cores(cluster, enumerate(missing, options.seed + block * groups))
        tables, steps = zip(*clustered, strict=True)
        estimate += torch.cat(steps, 1)
        yield Clustered(torch.cat(tables), scales, _left_out(vectors, estimate))


def _left_out(vectors: Tensor, found: Tensor) -> float:
    """Of the energy of vectors [n, C, w], the share that what was found for them leaves out."""
    return float((vectors - found).square().sum() / vectors.square().sum().clamp(min=1e-30))


def _stacked(
    of_blocks: Tables, blocks: int, progress: Progress
) -> tuple[Tensor, Tensor | None, list[float]]:
    """Tables, scales and what is left out, of all blocks; `progress` is told of each."""
    found: list[Clustered] = []
    progress("clustering", 0, blocks)
    for block, of_block in enumerate(of_blocks):
        found.append(of_block)
        progress("clustering", block + 1, blocks)
    tables = torch.stack([block.table for block in found]).cpu()
    scales = [block.scales for block in found if block.scales is not None]
    shares = [block.left_out for block in found]
    return tables, torch.stack(scales).cpu() if scales else None, shares
