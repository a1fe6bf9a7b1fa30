"""Launches the attention kernel: which tile, how many splits of the keys, and its constants.

The launchers of the ops (``kernel.py`` in their folders) say what the keys are (``sources``); this
file knows the kernel's signature, and ``arguments`` how tensors are handed over.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from astra_kernels._triton import attend as kernels
from astra_kernels._triton.arguments import (
    check_offsets,
    dense_arguments,
    mask_arguments,
    padded,
    remote_arguments,
    rows_contiguous,
    scale_and_sign,
    stride_unit,
    window,
)
from astra_kernels._triton.attend_tiles import (
    MOST_PAIRS,
    MOST_ROWS,
    TRITON_3_6,
    AttendProblem,
)
from astra_kernels._triton.blocks import BASE_2, NATURAL, PLAIN
from astra_kernels._triton.launch import capability, cdiv, launch, next_power_of_2, processors
from astra_kernels._triton.sources import Coded, Counted, Dense, Keys, State
from astra_kernels._triton.tiles import Tile, choose

# Up to this many rows (queries times query heads of a KV head) reading keys is what takes time.
FEW_ROWS = 64

# Programs of few rows that one multiprocessor runs side by side: of all tiles, where codes are
# packed, and of tiles so wide that more do not fit.
PROGRAMS_OF_FEW_ROWS, WITH_PACKED_CODES, OF_WIDE_TILES, WIDE = 4, 3, 2, 128

# The most splits ``combine`` takes in at once.
MOST_SPLITS = 64

# Channels of heads whose programs are many on a multiprocessor.
SMALL_HEAD = 32

# Partial rows a program of ``combine`` reads at a time.
COMBINED_AT_ONCE = 32


class Scores(NamedTuple):
    """What becomes of products: scale (None: 1/sqrt(d)), softcap, and sinks fp32 [H]."""

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def attend(
    query: Tensor,
    scores: Scores | float | None,
    *,
    dense: Dense | None = None,
    coded: Coded | None = None,
    counted: Counted | None = None,
    splits: int | None = None,
    tile: Tile | None = None,
) -> State:
    """One softmax over the dense keys and the coded (or counted) ones.

    query [B, H, M, d] gives out [B, H, M, d_v], stored [B, M, H, d_v], and lse [B, H, M].
    ``scores`` may be the scale alone; ``splits`` and ``tile`` override what is chosen.
    """
    scores = scores if isinstance(scores, Scores) else Scores(scores)
    keys = Keys(dense, coded, counted)
    batch, heads, num_queries, _ = query.shape
    kv_heads, width = keys.kv_heads, keys.value_width
    group = heads // kv_heads
    out = query.new_empty((batch, num_queries, heads, width))
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if keys.longest == 0 or query.numel() == 0 or out.numel() == 0:
        return _nothing_seen(out, lse, scores.sinks)
    rows, pairs = num_queries * group, batch * kv_heads
    units = _units(scores, keys)
    problem = problem_of(query, keys, units)
    tile = tile or choose(problem)
    grid_rows = cdiv(rows, tile.rows)
    if splits is None:
        tiles = cdiv(keys.longest, tile.columns)
        slots = processors(query.device) * _beside(problem, tile)
        splits = _splits(slots, grid_rows * pairs, tiles)
    if splits == 1:
        _run(query, scores, keys, out, lse, (grid_rows, 1, pairs), tile)
    else:
        planes = (2,) if units == NATURAL else ()
        parts = query.new_empty((splits, pairs, rows, width), dtype=torch.float32)
        part_lse = query.new_empty((*planes, splits, pairs, rows), dtype=torch.float32)
        _run(query, scores, keys, parts, part_lse, (grid_rows, splits, pairs), tile)
        _combine(parts, part_lse, out, lse, group, units)
    return out.transpose(1, 2), lse


def _nothing_seen(out: Tensor, lse: Tensor, sinks: Tensor | None) -> State:
    """Without keys: out 0, and lse -inf, or of sinks alone."""
    lse.fill_(-math.inf) if sinks is None else lse.copy_(sinks[:, None])
    return out.zero_().transpose(1, 2), lse


def problem_of(query: Tensor, keys: Keys, units: int = 0) -> AttendProblem:
    """What the choice of a tile depends on."""
    batch, heads, num_queries, dim = query.shape
    kv_heads, dense, coded = keys.kv_heads, keys.dense, keys.coded
    rows = num_queries * heads // kv_heads
    rotary, angles = False, 0
    if coded is not None and coded.rope is not None:
        rotary, angles = True, max(table.element_size() for table in coded.rope)
    tables = () if coded is None else (coded.key_table, coded.value_table)
    return AttendProblem(
        capability(query.device),
        query.element_size(),
        channels=max(
            2 * padded(dim // 2) if rotary else 0,
            *(padded(width) for width in (dim, keys.value_width)),
        ),
        staged=max(tensor.element_size() for tensor in (query, *keys.tables)),
        rotary=rotary,
        composed=any(table.shape[2] > 1 for table in tables),
        summed=max((table.shape[0] for table in tables), default=1),
        mixed=dense is not None and bool(keys.tables),
        few_rows=padded(rows) if rows <= FEW_ROWS else 0,
        angles=angles,
        packed=coded is not None and coded.bits is not None,
        causal=dense is not None and (dense.is_causal or dense.window is not None),
        rows=min(MOST_ROWS, padded(rows)),
        pairs=min(MOST_PAIRS, next_power_of_2(batch * kv_heads)),
        natural=bool(units == NATURAL),
        mask=max((mask.element_size() for mask in keys.masks), default=0),
        coded=coded is not None,
    )


def _units(scores: Scores, keys: Keys) -> int:
    """In what the kernel has scores, see ``loops``."""
    if scores[1:] != (None, None) or keys.masks:
        return int(NATURAL)
    return int(PLAIN if keys.counted is None else BASE_2)


def _beside(problem: AttendProblem, tile: Tile) -> int:
    """Programs that a multiprocessor runs side by side."""
    if not problem.few_rows:
        return 1
    if tile.columns >= WIDE:
        return OF_WIDE_TILES
    return WITH_PACKED_CODES if problem.packed else PROGRAMS_OF_FEW_ROWS


def _splits(slots: int, programs: int, key_tiles: int) -> int:
    """Into how many parts the keys are split, so that there are programs for the whole chip.

    Parts are whole tiles; no more than have any.
    """
    splits = max(1, min(slots // programs, key_tiles, MOST_SPLITS))
    return cdiv(key_tiles, cdiv(key_tiles, splits))


def _run(
    query: Tensor,
    scores: Scores,
    keys: Keys,
    out: Tensor,
    lse: Tensor,
    grid: tuple[int, int, int],
    tile: Tile,
) -> None:
    """Starts ``attend``; the grid is of tiles of rows, splits, and KV heads of batch rows."""
    _, heads, num_queries, dim = query.shape
    query = rows_contiguous(query)
    check_offsets(query)
    dense, coded, tables = keys.dense, keys.coded, keys.tables
    kv_heads, width, units = keys.kv_heads, keys.value_width, _units(scores, keys)
    group = heads // kv_heads
    local, unit = dense_arguments(dense), stride_unit(query, dense)
    codewords, value_codewords = [table.shape[-2] for table in tables] or (0, 0)
    left, right = window(dense)
    num_keys = 0 if dense is None else dense.key.shape[2]
    num_tokens = 0 if coded is None else coded.tokens
    launch(
        kernels.attend,
        grid,
        *(query, *(stride // unit for stride in query.stride()[:3]), out, lse),
        *(x // unit if isinstance(x, int) else x for x in local),
        *remote_arguments(coded, keys.counted, num_queries * group <= FEW_ROWS),
        *(group, kv_heads, num_queries, num_keys, num_tokens, codewords, value_codewords),
        *scale_and_sign(dim**-0.5 if scores.scale is None else scores.scale, units),
        *(scores.softcap, scores.sinks, left, right or None),
        *mask_arguments(query, None if dense is None else dense.attn_mask, num_keys, kv_heads),
        *mask_arguments(query, None if coded is None else coded.attn_mask, num_tokens, kv_heads),
        device=query.device,
        warps=tile.warps,
        stages=tile.stages,
        all_registers=_needs_registers(query, keys),
        **_constants(keys),
        CAUSAL=right is not None,
        ROTARY=coded is not None and coded.rope is not None,
        UNIT=unit,
        HEAD=dim,
        BLOCK=padded(dim),
        HALF_BLOCK=padded((dim + 1) // 2),
        VALUE_HEAD=width,
        VALUE_BLOCK=padded(width),
        UNITS=units,
        ROWS=tile.rows,
        KEYS=tile.columns,
        WHOLE=num_queries * group > FEW_ROWS and (dense is None or not tables) and left is None,
        PARTIAL=grid[1] > 1,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
    )


def _constants(keys: Keys) -> dict[str, int | bool]:
    """What the kernel is compiled for, as far as the keys say it."""
    dense, coded = keys.dense, keys.coded
    stages, _, groups = (1, 1, 1) if coded is None else coded.key_table.shape[:3]
    value_stages, _, value_groups = (1, 1, 1) if coded is None else coded.value_table.shape[:3]
    remote = kernels.NOTHING
    if keys.tables:
        remote = kernels.CODES if coded is not None else kernels.COUNTS
    return {
        "DENSE": dense is not None and dense.key.shape[2] > 0,
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


def _needs_registers(query: Tensor, keys: Keys) -> bool:
    """Whether operands pass through registers on their way to the matrix unit, or the assembler
    was seen to spill although there were registers left."""
    coded = keys.coded
    if query.element_size() == 4 or (keys.dense is not None and coded is not None):
        return True
    if coded is None:
        return False
    # 8 bytes each. On sm_90: by 3.6 rotated keys beside a mask of codes, by 3.9 plain keys in fp16.
    spilled = coded.rope is not None and coded.mask is not None
    spilled = spilled or (query.shape[3] <= SMALL_HEAD and not TRITON_3_6)
    # On sm_100: by 3.6 rotated keys of packed codes.
    if TRITON_3_6 and 100 <= capability(query.device) < 120:
        spilled = spilled or (coded.rope is not None and coded.bits is not None)
    return spilled or any(coded.key_table.shape[i] > 1 for i in (0, 2))


def _combine(
    parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, group: int, units: int
) -> None:
    splits, pairs, rows, width = parts.shape
    most = next_power_of_2(splits)
    at_once = max(1, COMBINED_AT_ONCE // most)
    launch(
        kernels.combine,
        (cdiv(rows, at_once), pairs),
        *(parts, part_lse, out, lse, group, out.shape[2] // group, rows // group, splits, pairs),
        device=out.device,
        warps=4,
        stages=1,
        HEAD=width,
        BLOCK=padded(width),
        SPLITS=most,
        ROWS=at_once,
        UNITS=units,
    )
