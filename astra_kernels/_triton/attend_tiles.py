"""Tiles of the attention kernel: what they are chosen by, and which there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import triton

from astra_kernels._triton.tiles import Problem, Tile

# Rows and programs beyond which a tile's speed no longer depends on how many more there are.
MOST_ROWS, MOST_PAIRS = 4096, 256

# Programs of 64 rows from which on two of them run on every multiprocessor of a Hopper GPU.
MANY_PROGRAMS = 256

# What the known GPUs run; others compile to other registers.
TRITON_3_6 = triton.__version__.startswith("3.6.")

# Elements of a mask per query that a thread may hold.
MOST_MASKED = 16


@dataclass(frozen=True)
class AttendProblem(Problem):
    """The attention kernel; ``channels`` is d, padded, by halves where it is rotary."""

    channels: int
    staged: int  # itemsize of rows: the wider of query and tables
    rotary: bool
    composed: bool  # rows of several sub-vectors, put together in registers
    summed: int  # additive stages
    mixed: bool  # dense and coded keys in one launch
    few_rows: int  # rows where they are few, padded; 0: many
    angles: int = 0  # itemsize of the angles that are read for every key
    packed: bool = False
    causal: bool = False
    rows: int = MOST_ROWS  # of a KV head, padded; as many or more
    pairs: int = MOST_PAIRS  # batch rows times KV heads, padded; as many or more
    natural: bool = False  # scores are capped, masked per query, or beside sinks
    mask: int = 0  # itemsize of the wider mask per query
    coded: bool = False  # keys are looked up in the loop

    def tiles(self) -> Sequence[Tile]:
        tiles = self._tiles()
        return [tile for tile in tiles if _holds_mask(tile)] if self.mask else tiles

    def _tiles(self) -> Sequence[Tile]:
        size = 64 if self.channels <= 64 else min(self.channels, 256)
        loaded = self.rotary or self.composed or self.mixed or self.summed > 1 or self.natural
        if self.itemsize == 4:
            return FLOAT_TILES[size, loaded]
        family = _family(self.capability)
        plain = not (self.composed or self.mixed or self.summed > 1 or self.natural or self.mask)
        if self.few_rows:
            tiles = _few_rows_tiles(self.few_rows, size, loaded)
            wide = family == 90 and plain and self.rotary and size == 128 and self.few_rows == 16
            return (Tile(16, 128, 4, 2), *tiles) if wide else tiles
        if family == 90 and plain and not self.coded and size <= 128:
            return self._measured_on_hopper(size)
        if family == 80 and self.mask and (self.rotary or self.composed or self.mixed):
            return _SMALL if TRITON_3_6 or not self.rotary else _SMALL[1:]
        if family == 90 and size == 128 and self.mask and self.rotary and not self.mixed:
            return _MASKED_ROTARY
        if family == 80 and size == 128 and not self.natural:
            if self.mixed and not (self.composed and self.summed > 1):
                return _SMALL
            if not loaded:
                return _HALVED
        if family == 80 and self.summed > 1:
            return _LAST if self.composed else _NARROW
        return HALF_TILES[family, size, loaded]

    def _measured_on_hopper(self, size: int) -> tuple[Tile, ...]:
        """Those of `HALF_TILES`, and before them what was quicker on an H200."""
        tiles = HALF_TILES[90, size, False]
        if size == 64:
            return (Tile(64, 128, 4, 2), Tile(64, 64, 4, 3), *tiles)
        if not TRITON_3_6:  # by 3.9 codewords spill 32 bytes of one, causal keys 48 of the other
            return tiles
        if self.rows * self.pairs >= 64 * MANY_PROGRAMS:
            return (Tile(64, 64, 4, 3), *tiles)
        # Beside a window it spills 8 bytes.
        return tiles if self.causal else (Tile(128, 128, 8, 3), *tiles)

    def shared_bytes(self, tile: Tile) -> int:
        row = self.channels * max(self.itemsize, self.staged)
        # Keys and values wait in as many buffers as there are pipeline stages, each summand apart.
        waiting = 2 * tile.stages * (self.summed if tile.stages > 1 else 1)
        # Rows that were turned, put together or split into two tf32 pass through once more.
        again = 2 if self.rotary or self.composed or self.itemsize == 4 else 0
        # Angles as wide as rows fit what is left of so many buffers; what they have more is added.
        wider = max(0, self.channels * self.angles - row) * max(1, tile.stages - 1)
        masks = tile.rows * tile.columns * self.mask * tile.stages
        return tile.rows * row + tile.columns * ((waiting + again) * row + wider) + masks + 2048

    def registers(self, tile: Tile) -> int:
        threads = 32 * tile.warps
        return 40 + tile.rows * (self.channels + 2 * tile.columns) // threads


def _holds_mask(tile: Tile) -> bool:
    """Whether a thread's part of a mask fits its registers, beside as many scores."""
    return tile.rows * tile.columns <= MOST_MASKED * 32 * tile.warps


# Compute capabilities that multiply matrices by the same instruction: mma.sync (also on consumer
# Blackwell, 120), wgmma, tcgen05.
def _family(capability: int) -> int:
    if capability < 90 or capability >= 120:
        return 80
    return 90 if capability < 100 else 100


# (family, channels, whether rotation, composition or a second loop take registers) -> tiles, best
# first. What spills, ahead-of-time compilation says (tests/triton_kernels/test_aot.py); what is
# quickest, `warmup` finds among those that do not.
_LAST = (Tile(32, 16, 4, 2), Tile(16, 16, 4, 1))
_WIDE = (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 2), *_LAST)
_NARROW = (Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), *_LAST)
_SMALL = (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), *_LAST)
# At 128 channels some tiles spill by one version of Triton or both. On sm_80, 64 columns: codewords
# alone 128 bytes by 3.9, 80 channels beside a mask of codes 56 by 3.6; keys of both kinds in four
# warps: rotated 8 by 3.9 and 16 by 3.6, counted 8 by 3.6. Rotated keys beside a mask per query, by
# 3.9: 8 in 64 by 32 on sm_80, 56 in 128 by 32 on sm_90.
_HALVED = (Tile(128, 32, 8, 3), Tile(64, 32, 4, 2), *_LAST)
_MASKED_ROTARY = (
    *((Tile(128, 32, 8, 3),) if TRITON_3_6 else ()),
    *(Tile(128, 16, 8, 3), *_SMALL),
)
HALF_TILES: Mapping[tuple[int, int, bool], tuple[Tile, ...]] = {
    (80, 64, False): _WIDE,
    (80, 64, True): (Tile(128, 32, 8, 3), *_NARROW),
    (80, 128, False): _WIDE,
    (80, 128, True): _NARROW,
    (80, 256, False): _SMALL,
    (80, 256, True): _SMALL,
    (90, 64, False): (*_WIDE, Tile(128, 128, 8, 3)),
    (90, 64, True): _WIDE,
    (90, 128, False): (*_WIDE, Tile(128, 64, 8, 4)),
    (90, 128, True): (*_WIDE, Tile(128, 64, 8, 4)),
    (90, 256, False): (Tile(128, 32, 8, 3), *_SMALL),
    (90, 256, True): (Tile(128, 32, 8, 2), *_SMALL),
    (100, 64, False): (*_WIDE, Tile(128, 128, 8, 3)),
    (100, 64, True): _WIDE,
    (100, 128, False): (*_WIDE, Tile(128, 64, 8, 4)),
    (100, 128, True): (*_WIDE, Tile(128, 64, 8, 4)),
    (100, 256, False): (Tile(128, 32, 8, 3), *_SMALL),
    (100, 256, True): (Tile(128, 32, 8, 2), *_SMALL),
}
# fp32 operands are split into sums of two tf32 in registers, which leaves room for little else.
FLOAT_TILES: Mapping[tuple[int, bool], tuple[Tile, ...]] = {
    (64, False): (Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 4, 1)),
    (64, True): (Tile(16, 32, 4, 2), Tile(16, 16, 4, 1)),
    (128, False): (Tile(16, 32, 8, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 1)),
    (128, True): (Tile(16, 32, 8, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 1)),
    (256, False): (Tile(16, 16, 8, 2), Tile(16, 16, 8, 1)),
    (256, True): (Tile(16, 16, 8, 2), Tile(16, 16, 8, 1)),
}


def _few_rows_tiles(rows: int, size: int, loaded: bool) -> tuple[Tile, ...]:
    last = (Tile(rows, 32, 4, 3), Tile(rows, 32, 4, 2), Tile(rows, 16, 4, 2), Tile(16, 16, 4, 1))
    if rows * size > 32 * 128 or (loaded and (rows > 16 or size > 64)):
        return last
    return (Tile(rows, 64, 4, 3), Tile(rows, 64, 4, 4), Tile(rows, 64, 4, 2), *last)
