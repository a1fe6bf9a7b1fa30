"""Launches the attention kernel: which tile, how many splits of the keys, and the arguments.

The launchers of the ops (``kernel.py`` in their folders) say what the keys are; this file knows the
kernel's signature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from astra_kernels._triton import attend as kernels
from astra_kernels._triton.launch import capability, cdiv, launch, next_power_of_2, processors
from astra_kernels._triton.packed import as_words
from astra_kernels._triton.tiles import Problem, Tile, choose

State = tuple[Tensor, Tensor]

# Up to this many rows (queries times query heads of a KV head) reading keys is what takes time.
FEW_ROWS = 64

# Programs of few rows that one multiprocessor runs side by side, and the most splits ``combine``
# takes in at once.
PROGRAMS_OF_FEW_ROWS = 4
MOST_SPLITS = 64

# Up to this many rows rotating queries, once a tile, costs less than reading a tile's angles.
ROWS_TO_ROTATE = 16

# Rows and programs beyond which a tile's speed no longer depends on how many more there are.
MOST_ROWS, MOST_PAIRS = 1024, 256

# Partial rows a program of ``combine`` reads at a time.
COMBINED_AT_ONCE = 32

LARGEST_OFFSET = 2**31
SMALLEST_SCALE = 2.0**-126


class Dense(NamedTuple):
    """Keys and values [B, Hkv, L, d] of query's dtype; mask bool [B, L] or None."""

    key: Tensor
    value: Tensor
    is_causal: bool = False
    mask: Tensor | None = None


class Coded(NamedTuple):
    """Tokens known by codes: integers [B, N, C], or with ``bits`` packed rows uint8 [B, bytes].

    Tables are [R, Hkv, S, K, d/S]; ``shared`` says that all KV heads have one set of codes.
    ``consecutive`` promises that the angles of ``rope`` grow by the same step from row to row.
    """

    tokens: int
    codes: Tensor
    key_table: Tensor
    shared: bool
    value_codes: Tensor
    value_table: Tensor
    value_shared: bool
    bits: int | None = None
    rope: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    consecutive: bool = False


class Counted(NamedTuple):
    """Codewords and how often they occur: counts [B, 1 or Hkv, K], tables [Hkv, 1, K, d]."""

    counts: Tensor
    key_table: Tensor
    value_table: Tensor


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

    def tiles(self) -> Sequence[Tile]:
        size = 64 if self.channels <= 64 else min(self.channels, 256)
        loaded = self.rotary or self.composed or self.mixed or self.summed > 1
        if self.itemsize == 4:
            return FLOAT_TILES[size, loaded]
        if self.few_rows:
            return _few_rows_tiles(self.few_rows, size, loaded)
        family = _family(self.capability)
        if family == 80 and self.summed > 1:
            return _LAST if self.composed else _NARROW
        return HALF_TILES[family, size, loaded]

    def shared_bytes(self, tile: Tile) -> int:
        row = self.channels * max(self.itemsize, self.staged)
        # Keys and values wait in as many buffers as there are pipeline stages, each summand apart.
        waiting = 2 * tile.stages * (self.summed if tile.stages > 1 else 1)
        # Rows that were turned, put together or split into two tf32 pass through once more.
        again = 2 if self.rotary or self.composed or self.itemsize == 4 else 0
        # Angles as wide as rows fit what is left of so many buffers; what they have more is added.
        wider = max(0, self.channels * self.angles - row) * max(1, tile.stages - 1)
        return tile.rows * row + tile.columns * ((waiting + again) * row + wider) + 2048

    def registers(self, tile: Tile) -> int:
        threads = 32 * tile.warps
        return 40 + tile.rows * (self.channels + 2 * tile.columns) // threads


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


def attend(
    query: Tensor,
    scale: float | None,
    *,
    dense: Dense | None = None,
    coded: Coded | None = None,
    counted: Counted | None = None,
    splits: int | None = None,
    tile: Tile | None = None,
) -> State:
    """One softmax over the dense keys and the coded (or counted) ones.

    query [B, H, M, d] gives out [B, H, M, d], stored [B, M, H, d], and lse [B, H, M]. ``splits``
    and ``tile`` override what is chosen.
    """
    batch, heads, num_queries, dim = query.shape
    kv_heads = _kv_heads(dense, coded, counted)
    group = heads // kv_heads
    out = query.new_empty((batch, num_queries, heads, dim))
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    keys = _longest(dense, coded, counted)
    if keys == 0 or query.numel() == 0:
        return out.zero_().transpose(1, 2), lse.fill_(-math.inf)
    rows, pairs = num_queries * group, batch * kv_heads
    problem = problem_of(query, dense, coded, counted)
    tile = tile or choose(problem)
    grid_rows = cdiv(rows, tile.rows)
    if splits is None:
        splits = _splits(query.device, grid_rows * pairs, cdiv(keys, tile.columns), problem)
    if splits == 1:
        _run(query, scale, dense, coded, counted, out, lse, (grid_rows, 1, pairs), tile)
    else:
        parts = query.new_empty((splits, pairs, rows, dim), dtype=torch.float32)
        part_lse = query.new_empty((splits, pairs, rows), dtype=torch.float32)
        grid = (grid_rows, splits, pairs)
        _run(query, scale, dense, coded, counted, parts, part_lse, grid, tile)
        _combine(parts, part_lse, out, lse, group)
    return out.transpose(1, 2), lse


def problem_of(
    query: Tensor, dense: Dense | None, coded: Coded | None, counted: Counted | None
) -> AttendProblem:
    """What the choice of a tile depends on."""
    batch, heads, num_queries, dim = query.shape
    kv_heads = _kv_heads(dense, coded, counted)
    rows = num_queries * heads // kv_heads
    rotary = _rotary(query, coded)
    angles = 0
    if coded is not None and coded.rope is not None and rotary == kernels.ANGLES:
        angles = max(table.element_size() for table in coded.rope)
    return AttendProblem(
        capability(query.device),
        query.element_size(),
        channels=max(_padded(dim), 2 * _padded(dim // 2)) if rotary else _padded(dim),
        staged=_staged(query, coded, counted),
        rotary=bool(rotary),
        **_composition(coded),
        mixed=dense is not None and (coded is not None or counted is not None),
        few_rows=_padded(rows) if rows <= FEW_ROWS else 0,
        angles=angles,
        packed=coded is not None and coded.bits is not None,
        causal=dense is not None and dense.is_causal,
        rows=min(MOST_ROWS, _padded(rows)),
        pairs=min(MOST_PAIRS, next_power_of_2(batch * kv_heads)),
    )


def _rotary(query: Tensor, coded: Coded | None) -> int:
    """How looked-up keys are rotated, as the kernel's ROTARY says it."""
    if coded is None or coded.rope is None:
        return int(kernels.UNROTATED)
    rows = query.shape[2] * query.shape[1] // coded.key_table.shape[1]
    if coded.consecutive and rows <= ROWS_TO_ROTATE:
        return int(kernels.CONSECUTIVE)
    return int(kernels.ANGLES)


def _kv_heads(dense: Dense | None, coded: Coded | None, counted: Counted | None) -> int:
    if dense is not None:
        return dense.key.shape[1]
    if coded is not None:
        return coded.key_table.shape[1]
    assert counted is not None
    return counted.key_table.shape[0]


def _staged(query: Tensor, coded: Coded | None, counted: Counted | None) -> int:
    read = [query]
    if coded is not None:
        read += [coded.key_table, coded.value_table]
    if counted is not None:
        read += [counted.key_table, counted.value_table]
    return max(tensor.element_size() for tensor in read)


def _composition(coded: Coded | None) -> dict[str, Any]:
    if coded is None:
        return {"composed": False, "summed": 1}
    tables = (coded.key_table, coded.value_table)
    return {
        "composed": any(table.shape[2] > 1 for table in tables),
        "summed": max(table.shape[0] for table in tables),
    }


def _longest(dense: Dense | None, coded: Coded | None, counted: Counted | None) -> int:
    """Keys of the longer source: it says into how many parts keys may be split."""
    return max(
        dense.key.shape[2] if dense is not None else 0,
        coded.tokens if coded is not None else 0,
        counted.key_table.shape[2] if counted is not None else 0,
    )


def _splits(device: torch.device, programs: int, key_tiles: int, problem: AttendProblem) -> int:
    """Into how many parts the keys are split, so that there are programs for the whole chip."""
    slots = processors(device) * (PROGRAMS_OF_FEW_ROWS if problem.few_rows else 1)
    return max(1, min(slots // programs, key_tiles, MOST_SPLITS))


def _run(
    query: Tensor,
    scale: float | None,
    dense: Dense | None,
    coded: Coded | None,
    counted: Counted | None,
    out: Tensor,
    lse: Tensor,
    grid: tuple[int, int, int],
    tile: Tile,
) -> None:
    _, heads, num_queries, dim = query.shape
    query = _rows_contiguous(query)
    _check_offsets(query)
    kv_heads = _kv_heads(dense, coded, counted)
    group = heads // kv_heads
    remote, tables = _remote_arguments(coded, counted)
    local, unit = _dense_arguments(dense), _stride_unit(query, dense)
    codewords = tables[0].shape[3] if tables else 0
    value_codewords = tables[1].shape[3] if tables else 0
    launch(
        kernels.attend,
        grid,
        *(query, *(stride // unit for stride in query.stride()[:3]), out, lse),
        *(x // unit if isinstance(x, int) else x for x in local),
        *remote,
        *(group, kv_heads, num_queries, 0 if dense is None else dense.key.shape[2]),
        *(0 if coded is None else coded.tokens, codewords, value_codewords),
        *_scale_and_sign(dim**-0.5 if scale is None else scale),
        device=query.device,
        warps=tile.warps,
        stages=tile.stages,
        all_registers=_needs_registers(query, dense, coded),
        **_constants(dense, coded, counted),
        ROTARY=_rotary(query, coded),
        UNIT=unit,
        HEAD=dim,
        BLOCK=_padded(dim),
        HALF_BLOCK=_padded((dim + 1) // 2),
        ROWS=tile.rows,
        KEYS=tile.columns,
        WHOLE=num_queries * group > FEW_ROWS and (dense is None or not tables),
        PARTIAL=grid[1] > 1,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
    )


def _scale_and_sign(scale: float) -> tuple[float, float]:
    """A positive scale in base 2, by which the largest score stays the largest, and its sign.

    Zero becomes the smallest normal number, which no hidden key's score of -inf turns into NaN.
    """
    base_2 = abs(scale) * math.log2(math.e)
    if not math.isnan(base_2):  # which stays what it is
        base_2 = max(base_2, SMALLEST_SCALE)
    return base_2, math.copysign(1.0, scale)


def _needs_registers(query: Tensor, dense: Dense | None, coded: Coded | None) -> bool:
    """Whether operands pass through registers on their way to the matrix unit."""
    if query.element_size() == 4 or (dense is not None and coded is not None):
        return True
    return coded is not None and any(coded.key_table.shape[i] > 1 for i in (0, 2))


def _dense_arguments(dense: Dense | None) -> tuple[Any, ...]:
    if dense is None:
        return (None, 0, 0, 0, None, 0, 0, 0, None)
    key, value = _rows_contiguous(dense.key), _rows_contiguous(dense.value)
    mask = None if dense.mask is None else dense.mask.contiguous()
    _check_offsets(key, value)
    return (key, *key.stride()[:3], value, *value.stride()[:3], mask)


def _stride_unit(query: Tensor, dense: Dense | None) -> int:
    """What divides all strides, up to 16 elements: so wide the compiler knows that it may read."""
    strides = list(query.stride()[:3])
    if dense is not None:
        for tensor in (dense.key, dense.value):
            strides += _rows_contiguous(tensor).stride()[:3]
    return math.gcd(16, *strides)


def _remote_arguments(
    coded: Coded | None, counted: Counted | None
) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """The kernel's arguments from ``codes`` to ``bias_h``, and the two tables."""
    if counted is not None:
        tables = [table.contiguous().unsqueeze(0) for table in counted[1:]]
        _check_offsets(*tables, axes=5)
        # Once for all programs: in the kernel a logarithm costs as much as all else on a score.
        bias = counted.counts.new_empty(counted.counts.shape, dtype=torch.float32)
        torch.log2(counted.counts, out=bias)
        bias_arguments = (bias, bias.stride(0), bias.stride(1) if bias.shape[1] > 1 else 0)
        return (None, 0, None, 0, *tables, None, None, 0, None, *bias_arguments), tuple(tables)
    if coded is None:
        return (None, 0, None, 0, None, None, None, None, 0, None, None, 0, 0), ()
    codes, value_codes = as_words(coded.codes, coded.bits), None
    if coded.value_codes is not coded.codes:
        value_codes = as_words(coded.value_codes, coded.bits)
    tables = [coded.key_table.contiguous(), coded.value_table.contiguous()]
    cos, sin = coded.rope or (None, None)
    if cos is not None and sin is not None:
        if cos.shape != sin.shape:  # one is the same for all batch rows
            cos, sin = torch.broadcast_tensors(cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        _check_offsets(cos, axes=2)
    angles_b = cos.stride(0) if cos is not None and cos.ndim == 3 and cos.shape[0] > 1 else 0
    mask = None if coded.mask is None else coded.mask.contiguous()
    _check_offsets(*tables, axes=5)
    _check_offsets(codes, codes if value_codes is None else value_codes, bits=coded.bits)
    return (
        *(codes, codes.stride(0)),
        *(value_codes, 0 if value_codes is None else value_codes.stride(0), *tables),
        *(cos, sin, angles_b, mask, None, 0, 0),
    ), tuple(tables)


def _constants(
    dense: Dense | None, coded: Coded | None, counted: Counted | None
) -> dict[str, int | bool]:
    """What the kernel is compiled for, as far as the keys say it."""
    stages, _, groups = (1, 1, 1) if coded is None else coded.key_table.shape[:3]
    value_stages, _, value_groups = (1, 1, 1) if coded is None else coded.value_table.shape[:3]
    remote = kernels.NOTHING
    if coded is not None or counted is not None:
        remote = kernels.CODES if coded is not None else kernels.COUNTS
    return {
        "DENSE": dense is not None and dense.key.shape[2] > 0,
        "CAUSAL": dense is not None and dense.is_causal,
        "KEY_MASK": dense is not None and dense.mask is not None,
        "REMOTE": int(remote),
        "CODE_MASK": coded is not None and coded.mask is not None,
        "BITS": 0 if coded is None or coded.bits is None else coded.bits,
        "SHARED": coded is not None and coded.shared,
        "VALUE_SHARED": coded is not None and coded.value_shared,
        "STAGES": stages,
        "GROUPS": groups,
        "VALUE_STAGES": value_stages,
        "VALUE_GROUPS": value_groups,
    }


def _combine(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, group: int) -> None:
    splits, pairs, rows, dim = parts.shape
    padded = next_power_of_2(splits)
    at_once = max(1, COMBINED_AT_ONCE // padded)
    launch(
        kernels.combine,
        (cdiv(rows, at_once), pairs),
        *(parts, part_lse, out, lse, group, out.shape[2] // group, rows // group, splits, pairs),
        device=out.device,
        warps=4,
        stages=1,
        HEAD=dim,
        BLOCK=_padded(dim),
        SPLITS=padded,
        ROWS=at_once,
    )


def _padded(channels: int) -> int:
    """Matrix instructions take powers of two, from 16 on."""
    return max(16, next_power_of_2(channels))


def _rows_contiguous(x: Tensor) -> Tensor:
    """Channels one after the other, rows within reach of 32 bits: other views are copied."""
    fine = (x.stride(-1) == 1 or x.shape[-1] == 1) and _reach(x, x.ndim - 1) < LARGEST_OFFSET
    return x if fine else x.contiguous()


def _reach(x: Tensor, axes: int) -> int:
    """Elements from the first to the last one along the last axes."""
    sizes = zip(x.shape[-axes:], x.stride()[-axes:], strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sizes)


def _check_offsets(*tensors: Tensor, axes: int | None = None, bits: int | None = None) -> None:
    """Offsets within a batch row (or as many of the last ``axes``) are 32-bit, in bits of codes."""
    for tensor in tensors:
        steps = _reach(tensor, axes or tensor.ndim - 1) * (32 if bits else 1)
        if steps >= LARGEST_OFFSET:
            raise ValueError(
                f"astra_kernels: a batch row or table of {LARGEST_OFFSET} elements or more is too "
                f"large for impl='triton', got shape {list(tensor.shape)}"
            )
