"""Launches the search for the nearest codeword: which tile, how many splits of the codewords."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from astra_kernels._triton import nearest as kernels
from astra_kernels._triton.launch import capability, cdiv, launch, next_power_of_2, processors
from astra_kernels._triton.tiles import Problem, Tile, choose

# Most of the channels that a program of narrow groups holds of its rows at once.
NARROW = {2: 128, 4: 32}  # by itemsize

# Codes, or bytes, that a program of ``finish`` makes; codewords that one of ``half_norm`` reads.
FINISHED_AT_ONCE = 128
NORMS_AT_ONCE = 16

# Programs of four warps that a multiprocessor runs side by side; the most splits.
BESIDE = 3
MOST_SPLITS = 128
FINISH_TILES = 4

# Shared memory for what is not a tile of channels: reductions, norms.
REDUCTION_BYTES = 4096

# Offsets from a tile's first row are 32-bit.
LARGEST_OFFSET = 2**31


@dataclass(frozen=True)
class EncodeProblem(Problem):
    """The search: ``itemsize`` 2 where products are exact, 4 where they are made in fp32.

    width: w padded to a power of two; whole: w is a multiple of WHOLE; rows: T padded to a power of
    two, from 16 to 256; area: scores that every multiprocessor has to make, rounded to one.
    """

    width: int
    whole: bool
    rows: int
    area: int

    def narrow(self) -> bool:
        return self.width <= NARROW[self.itemsize]

    def tiles(self) -> Sequence[Tile]:
        """Those that leave no multiprocessor idle, and the smallest whatever it leaves."""
        tiles = TILES[self.itemsize, self.narrow()]
        if self.capability == 90 and self.itemsize == 2 and self.whole and not self.narrow():
            tiles = (LARGEST, *tiles)
        fitting = [t for t in tiles if t.rows <= self.rows and t.rows * t.columns <= self.area]
        return fitting + [t for t in tiles[::-1] if t not in fitting]

    def shared_bytes(self, tile: Tile) -> int:
        if tile.depth == 0:  # the vectors stay; for tf32 both sides are split into two parts
            split = tile.rows + tile.columns if self.itemsize == 4 else 0
            channels = tile.rows + tile.stages * tile.columns + split
        else:
            channels = tile.stages * (tile.rows + tile.columns)
        return channels * (tile.depth or self.width) * self.itemsize + REDUCTION_BYTES

    def registers(self, tile: Tile) -> int:
        scores = tile.rows * tile.columns // (32 * tile.warps)
        fixed, each = REGISTERS[self.itemsize, tile.depth == 0]
        return int(fixed + each * scores)


# Registers of a thread: some, and so many for each of its scores; fitted to the compiler's reports.
# By itemsize, and whether all channels are one step.
REGISTERS = {
    (2, True): (32, 3.5),
    (2, False): (48, 1.6),
    (4, True): (32, 5.0),
    (4, False): (70, 4.0),
}

# Where channels are whole steps, Hopper can hold this one; others would have to spill registers.
LARGEST, WHOLE = Tile(256, 128, 8, 3, 64), 64

TILES = {
    (2, True): (Tile(128, 32, 4, 4), Tile(64, 32, 4, 4), Tile(16, 32, 4, 3)),
    (2, False): (
        Tile(128, 128, 8, 3, 64),
        Tile(64, 128, 4, 3, 64),
        Tile(64, 64, 4, 3, 64),
        Tile(16, 64, 4, 3, 64),
        Tile(16, 32, 4, 3, 64),
    ),
    (4, True): (Tile(128, 32, 8, 3), Tile(64, 32, 4, 3), Tile(16, 32, 4, 3)),
    (4, False): (
        Tile(128, 64, 8, 3, 32),
        Tile(64, 64, 4, 3, 32),
        Tile(16, 64, 4, 3, 32),
        Tile(16, 32, 4, 3, 32),
    ),
}


def encode(
    vectors: Tensor,
    codebook: Tensor,
    half_norms: Tensor | None = None,
    *,
    splits: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """vectors [..., C, w], codebook [C, K, w] -> int32 [..., C]; see ``astra_kernels.encode``.

    ``splits`` and ``tile`` override what is chosen.
    """
    codes = vectors.new_empty(vectors.shape[:-1], dtype=torch.int32)
    if vectors.numel() == 0:  # there are no codes, or no channels to tell codewords apart
        return codes.zero_()
    tile = tile or choose(problem_of(vectors, codebook))
    splits = splits or _splits(vectors, codebook, tile)
    if splits == 1:
        search(vectors, codebook, half_norms, tile, None, codes.view(1, -1))
    else:
        scores, parts = scratch(vectors, splits)
        search(vectors, codebook, half_norms, tile, scores, parts)
        run_finish(scores, parts, codes.view(1, -1))
    return codes


def search_in_splits(
    vectors: Tensor,
    codebook: Tensor,
    half_norms: Tensor | None,
    splits: int | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Every split's best score and code, fp32 and int32 [splits, T * C], for ``run_finish``."""
    tile = tile or choose(problem_of(vectors, codebook))
    scores, codes = scratch(vectors, splits or _splits(vectors, codebook, tile))
    search(vectors, codebook, half_norms, tile, scores, codes)
    return scores, codes


def problem_of(vectors: Tensor, codebook: Tensor) -> EncodeProblem:
    groups, codewords, width = codebook.shape
    count = vectors.numel() // (groups * width)
    scores = count * groups * codewords // processors(vectors.device)
    return EncodeProblem(
        capability(vectors.device),
        2 if _exact(vectors, codebook) else 4,
        width=max(16, next_power_of_2(width)),
        whole=width % WHOLE == 0,
        rows=min(256, max(16, next_power_of_2(count))),
        area=1 << max(0, round(math.log2(max(1, scores)))),
    )


def _exact(vectors: Tensor, codebook: Tensor) -> bool:
    return vectors.dtype == codebook.dtype and vectors.element_size() == 2


def _splits(vectors: Tensor, codebook: Tensor, tile: Tile) -> int:
    groups, codewords, width = codebook.shape
    count = vectors.numel() // (groups * width)
    slots = processors(vectors.device) * (BESIDE if tile.warps <= 4 else 1)
    return _even_splits(cdiv(count, tile.rows) * groups, cdiv(codewords, tile.columns), slots)


@functools.lru_cache(maxsize=1024)
def _even_splits(programs: int, tiles: int, slots: int) -> int:
    """Into how many splits a row of ``tiles`` is split so that the chip is done soonest.

    The chip runs ``slots`` programs at a time; starting one costs about what a tile does, and
    ``finish`` what FINISH_TILES do.
    """

    def time(splits: int) -> int:
        rounds = cdiv(programs * splits, slots)
        return rounds * (cdiv(tiles, splits) + 1) + (FINISH_TILES if splits > 1 else 0)

    return min(range(1, min(tiles, MOST_SPLITS) + 1), key=lambda splits: (time(splits), splits))


def scratch(vectors: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Scores and codes of every split, fp32 and int32 [splits, T * C]."""
    size = (splits, vectors.shape[:-1].numel())
    return vectors.new_empty(size, dtype=torch.float32), vectors.new_empty(size, dtype=torch.int32)


def search(
    vectors: Tensor,
    codebook: Tensor,
    half_norms: Tensor | None,
    tile: Tile,
    scores: Tensor | None,
    codes: Tensor,
) -> None:
    """Fills scores and codes [splits, T * C]; without scores there is one split."""
    groups, codewords, width = codebook.shape
    codebook = codebook.contiguous()
    if half_norms is None:
        half_norms = half_norms_of(codebook)
    rows = vectors.reshape(-1, groups, width)
    if rows.stride(2) != 1 or rows.stride(0) * tile.rows >= LARGEST_OFFSET:
        rows = rows.contiguous()
    half_norms = half_norms.to(torch.float32).contiguous()
    unit = math.gcd(*rows.stride()[:2], 16)
    launch(
        kernels.nearest,
        (cdiv(rows.shape[0], tile.rows), codes.shape[0], groups),
        *(rows, *(stride // unit for stride in rows.stride()[:2]), codebook, half_norms),
        *(scores, codes, rows.shape[0], codewords),
        device=rows.device,
        warps=tile.warps,
        stages=tile.stages,
        CHANNELS=width,
        DEPTH=tile.depth or max(16, next_power_of_2(width)),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        EXACT=_exact(vectors, codebook),
        PARTIAL=scores is not None,
        UNIT=unit,
    )


def half_norms_of(codebook: Tensor) -> Tensor:
    """codebook [C, K, w], contiguous -> fp32 [C, K]."""
    groups, codewords, width = codebook.shape
    norms = codebook.new_empty((groups, codewords), dtype=torch.float32)
    launch(
        kernels.half_norm,
        (cdiv(norms.numel(), NORMS_AT_ONCE),),
        *(codebook, norms, norms.numel()),
        device=codebook.device,
        warps=4,
        stages=1,
        CHANNELS=width,
        DEPTH=min(256, max(16, next_power_of_2(width))),
        ROWS=NORMS_AT_ONCE,
    )
    return norms


def run_finish(scores: Tensor, codes: Tensor, out: Tensor, bits: int = 0) -> None:
    """Splits' [splits, B * n] -> out int32 [B, n], or uint8 [B, bytes] of codes packed in bits."""
    batch, size = out.shape
    launch(
        kernels.finish,
        (cdiv(size, FINISHED_AT_ONCE), batch),
        *(scores, codes, out, codes.shape[1] // max(1, batch), size, codes.shape[0]),
        device=out.device,
        warps=4,
        stages=1,
        BITS=bits,
        CODES=codes_of_a_byte(bits) if bits else 1,
        BLOCK=FINISHED_AT_ONCE,
    )


def codes_of_a_byte(bits: int) -> int:
    """Most codes with bits in one byte, which begins up to bits - gcd(8, bits) into a code."""
    return (7 + bits - math.gcd(8, bits)) // bits + 1
