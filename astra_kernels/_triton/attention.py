"""Launches the attention kernel: which tile, how many splits of the keys, and the arguments.

The launchers of the ops (``kernel.py`` in their folders) say what the keys are; this file knows the
kernel's signature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from astra_kernels._triton import attend as kernels
from astra_kernels._triton import loops
from astra_kernels._triton.attend_tiles import (
    MOST_PAIRS,
    MOST_ROWS,
    TRITON_3_6,
    AttendProblem,
)
from astra_kernels._triton.blocks import BASE_2, NATURAL, PLAIN
from astra_kernels._triton.launch import capability, cdiv, launch, next_power_of_2, processors
from astra_kernels._triton.packed import as_words
from astra_kernels._triton.tiles import Tile, choose

State = tuple[Tensor, Tensor]

# Up to this many rows (queries times query heads of a KV head) reading keys is what takes time.
FEW_ROWS = 64

# Programs of few rows that one multiprocessor runs side by side, and the most splits ``combine``
# takes in at once.
PROGRAMS_OF_FEW_ROWS = 4
MOST_SPLITS = 64

# Up to this many rows rotating queries, once a tile, costs less than reading a tile's angles.
ROWS_TO_ROTATE = 16

# Channels of heads whose programs are many on a multiprocessor.
SMALL_HEAD = 32

# Partial rows a program of ``combine`` reads at a time.
COMBINED_AT_ONCE = 32

LARGEST_OFFSET = 2**31
SMALLEST_SCALE = 2.0**-126


class Dense(NamedTuple):
    """Keys [B, Hkv, L, d] and values [B, Hkv, L, d_v] of query's dtype; mask bool [B, L] or None.

    ``attn_mask`` broadcasts to [B, H, M, L], bool or floats; ``window`` is (left, right).
    """

    key: Tensor
    value: Tensor
    is_causal: bool = False
    mask: Tensor | None = None
    attn_mask: Tensor | None = None
    window: Sequence[int] | None = None


class Coded(NamedTuple):
    """Tokens known by codes: integers [B, N, C], or with ``bits`` packed rows uint8 [B, bytes].

    Tables are [R, Hkv, S, K, d/S], those of values [R, Hkv, S, K, d_v/S]; ``shared`` says that all
    KV heads have one set of codes. ``consecutive`` promises that the angles of ``rope`` grow by the
    same step from row to row. ``attn_mask`` broadcasts to [B, H, M, N].
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
    attn_mask: Tensor | None = None


class Counted(NamedTuple):
    """Codewords and how often they occur: counts [B, 1 or Hkv, K], tables [Hkv, 1, K, d or d_v]."""

    counts: Tensor
    key_table: Tensor
    value_table: Tensor


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
    batch, heads, num_queries, _ = query.shape
    kv_heads = _kv_heads(dense, coded, counted)
    group = heads // kv_heads
    width = _value_width(dense, coded, counted)
    out = query.new_empty((batch, num_queries, heads, width))
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    keys = _longest(dense, coded, counted)
    if keys == 0 or query.numel() == 0 or out.numel() == 0:
        return _nothing_seen(out, lse, scores.sinks)
    rows, pairs = num_queries * group, batch * kv_heads
    units = _units(scores, dense, coded, counted)
    problem = problem_of(query, dense, coded, counted, units)
    tile = tile or choose(problem)
    grid_rows = cdiv(rows, tile.rows)
    if splits is None:
        splits = _splits(query.device, grid_rows * pairs, cdiv(keys, tile.columns), problem)
    if splits == 1:
        _run(query, scores, dense, coded, counted, out, lse, (grid_rows, 1, pairs), tile)
    else:
        planes = (2,) if units == NATURAL else ()
        parts = query.new_empty((splits, pairs, rows, width), dtype=torch.float32)
        part_lse = query.new_empty((*planes, splits, pairs, rows), dtype=torch.float32)
        grid = (grid_rows, splits, pairs)
        _run(query, scores, dense, coded, counted, parts, part_lse, grid, tile)
        _combine(parts, part_lse, out, lse, group, units)
    return out.transpose(1, 2), lse


def _nothing_seen(out: Tensor, lse: Tensor, sinks: Tensor | None) -> State:
    """Without keys: out 0, and lse -inf, or of sinks alone."""
    lse.fill_(-math.inf) if sinks is None else lse.copy_(sinks[:, None])
    return out.zero_().transpose(1, 2), lse


def problem_of(
    query: Tensor,
    dense: Dense | None,
    coded: Coded | None,
    counted: Counted | None,
    units: int = 0,
) -> AttendProblem:
    """What the choice of a tile depends on."""
    batch, heads, num_queries, dim = query.shape
    kv_heads = _kv_heads(dense, coded, counted)
    rows = num_queries * heads // kv_heads
    rotary = _rotary(query, coded)
    angles = 0
    if coded is not None and coded.rope is not None and rotary == loops.ANGLES:
        angles = max(table.element_size() for table in coded.rope)
    return AttendProblem(
        capability(query.device),
        query.element_size(),
        channels=max(
            2 * padded(dim // 2) if rotary else 0,
            *(padded(width) for width in (dim, _value_width(dense, coded, counted))),
        ),
        staged=_staged(query, coded, counted),
        rotary=bool(rotary),
        **_composition(coded),
        mixed=dense is not None and (coded is not None or counted is not None),
        few_rows=padded(rows) if rows <= FEW_ROWS else 0,
        angles=angles,
        packed=coded is not None and coded.bits is not None,
        causal=dense is not None and (dense.is_causal or dense.window is not None),
        rows=min(MOST_ROWS, padded(rows)),
        pairs=min(MOST_PAIRS, next_power_of_2(batch * kv_heads)),
        natural=bool(units == NATURAL),
        mask=max((mask.element_size() for mask in _masks(dense, coded)), default=0),
    )


def _rotary(query: Tensor, coded: Coded | None) -> int:
    """How looked-up keys are rotated, as the kernel's ROTARY says it."""
    if coded is None or coded.rope is None:
        return int(loops.UNROTATED)
    rows = query.shape[2] * query.shape[1] // coded.key_table.shape[1]
    if coded.consecutive and rows <= ROWS_TO_ROTATE:
        return int(loops.CONSECUTIVE)
    return int(loops.ANGLES)


def _kv_heads(dense: Dense | None, coded: Coded | None, counted: Counted | None) -> int:
    if dense is not None:
        return dense.key.shape[1]
    if coded is not None:
        return coded.key_table.shape[1]
    assert counted is not None
    return counted.key_table.shape[0]


def _value_width(dense: Dense | None, coded: Coded | None, counted: Counted | None) -> int:
    """d_v."""
    if dense is not None:
        return dense.value.shape[3]
    if coded is not None:
        return coded.value_table.shape[2] * coded.value_table.shape[4]
    assert counted is not None
    return counted.value_table.shape[3]


def _masks(dense: Dense | None, coded: Coded | None) -> list[Tensor]:
    """Masks per query."""
    masks = [keys.attn_mask for keys in (dense, coded) if keys is not None]
    return [mask for mask in masks if mask is not None]


def _units(
    scores: Scores, dense: Dense | None, coded: Coded | None, counted: Counted | None
) -> int:
    """In what the kernel has scores, see ``loops``."""
    if scores[1:] != (None, None) or _masks(dense, coded):
        return int(NATURAL)
    return int(PLAIN if counted is None else BASE_2)


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
    scores: Scores,
    dense: Dense | None,
    coded: Coded | None,
    counted: Counted | None,
    out: Tensor,
    lse: Tensor,
    grid: tuple[int, int, int],
    tile: Tile,
) -> None:
    _, heads, num_queries, dim = query.shape
    query = rows_contiguous(query)
    _check_offsets(query)
    kv_heads = _kv_heads(dense, coded, counted)
    group = heads // kv_heads
    remote, tables = _remote_arguments(coded, counted)
    local, unit = _dense_arguments(dense), _stride_unit(query, dense)
    codewords = tables[0].shape[3] if tables else 0
    value_codewords = tables[1].shape[3] if tables else 0
    width, units = _value_width(dense, coded, counted), _units(scores, dense, coded, counted)
    left, right = window(dense)
    num_keys = 0 if dense is None else dense.key.shape[2]
    num_tokens = 0 if coded is None else coded.tokens
    launch(
        kernels.attend,
        grid,
        *(query, *(stride // unit for stride in query.stride()[:3]), out, lse),
        *(x // unit if isinstance(x, int) else x for x in local),
        *remote,
        *(group, kv_heads, num_queries, num_keys, num_tokens, codewords, value_codewords),
        *_scale_and_sign(dim**-0.5 if scores.scale is None else scores.scale, units),
        *(scores.softcap, scores.sinks, left, right or None),
        *mask_arguments(query, None if dense is None else dense.attn_mask, num_keys, kv_heads),
        *mask_arguments(query, None if coded is None else coded.attn_mask, num_tokens, kv_heads),
        device=query.device,
        warps=tile.warps,
        stages=tile.stages,
        all_registers=_needs_registers(query, dense, coded),
        **_constants(dense, coded, counted),
        CAUSAL=right is not None,
        ROTARY=_rotary(query, coded),
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


def window(dense: Dense | None) -> tuple[int | None, int | None]:
    """How far queries see to the left and to the right of their key; None: to the end."""
    if dense is None:
        return None, None
    left, right = (-1, -1) if dense.window is None else dense.window
    if dense.is_causal:
        right = 0
    # Beyond all keys is no limit, and sums stay within 32 bits.
    farthest = LARGEST_OFFSET // 4
    limits = [None if size < 0 else min(int(size), farthest) for size in (left, right)]
    return limits[0], limits[1]


def mask_arguments(
    query: Tensor, mask: Tensor | None, tokens: int, kv_heads: int
) -> tuple[Any, ...]:
    """A mask per query and its four strides, and which keys it shows to any query.

    A broadcast mask is read by strides of 0.
    """
    if mask is None:
        return (None,) * 8
    seen = _seen(mask, kv_heads)
    seen = seen.expand(*seen.shape[:2], tokens).contiguous()
    seen = seen.expand(query.shape[0], kv_heads, tokens)
    mask = mask.expand(*query.shape[:3], tokens)
    _check_offsets(mask, axes=1)
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return (mask, *mask.stride(), seen, *seen.stride()[:2])


def _seen(mask: Tensor, kv_heads: int) -> Tensor:
    """Keys that any query of a KV head sees, uint8 [1 or B, 1 or Hkv, 1 or N].

    What others hold must not matter; in the kernel this would cost more than the mask itself.
    """
    mask = mask[(None,) * (4 - mask.ndim)]
    for axis in range(4):  # what is broadcast need not be read again and again
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, min(1, mask.shape[axis]))
    seen = mask.any(2) if mask.dtype == torch.bool else mask.amax(2) != -math.inf
    if seen.shape[1] > 1:
        seen = seen.unflatten(1, (kv_heads, -1)).any(2)
    return seen.to(torch.uint8)


def _scale_and_sign(scale: float, units: int) -> tuple[float, float]:
    """A positive scale, by which the largest score stays the largest, and its sign.

    In base 2 unless scores are natural. Zero becomes the smallest normal number, which no hidden
    key's score of -inf turns into NaN.
    """
    size = abs(scale) * (1.0 if units == NATURAL else math.log2(math.e))
    if not math.isnan(size):  # which stays what it is
        size = max(size, SMALLEST_SCALE)
    return size, math.copysign(1.0, scale)


def _needs_registers(query: Tensor, dense: Dense | None, coded: Coded | None) -> bool:
    """Whether operands pass through registers on their way to the matrix unit, or the assembler
    was seen to spill although there were registers left."""
    if query.element_size() == 4 or (dense is not None and coded is not None):
        return True
    if coded is None:
        return False
    # On sm_90, 8 bytes each: by 3.6 rotated keys beside a mask of codes, by 3.9 plain keys in fp16.
    spilled = coded.rope is not None and coded.mask is not None
    spilled = spilled or (query.shape[3] <= SMALL_HEAD and not TRITON_3_6)
    return spilled or any(coded.key_table.shape[i] > 1 for i in (0, 2))


def _dense_arguments(dense: Dense | None) -> tuple[Any, ...]:
    if dense is None:
        return (None, 0, 0, 0, None, 0, 0, 0, None)
    key, value = rows_contiguous(dense.key), rows_contiguous(dense.value)
    mask = None if dense.mask is None else dense.mask.contiguous()
    _check_offsets(key, value)
    return (key, *key.stride()[:3], value, *value.stride()[:3], mask)


def _stride_unit(query: Tensor, dense: Dense | None) -> int:
    """What divides all strides, up to 16 elements: so wide the compiler knows that it may read."""
    strides = list(query.stride()[:3])
    if dense is not None:
        for tensor in (dense.key, dense.value):
            strides += rows_contiguous(tensor).stride()[:3]
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


def padded(channels: int) -> int:
    """Matrix instructions take powers of two, from 16 on."""
    return max(16, next_power_of_2(channels))


def rows_contiguous(x: Tensor) -> Tensor:
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
