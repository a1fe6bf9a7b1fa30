"""Any number of partial softmaxes become one in Triton, in one pass over the outputs."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from astra_kernels._checks import fail_value
from astra_kernels._triton.launch import cdiv, launch, next_power_of_2
from astra_kernels.merge_state.kernel import CHANNELS, ELEMENTS, LARGEST_ROW, WARPS
from astra_kernels.merge_states import reference

ALIGNED = 8  # elements of 16 bytes at the most


@triton.jit(do_not_specialize=["states", "rows", "middle", "inner"])
def merge_all(
    outs, lses, out, lse,  # lses [states, rows], out [rows, d]
    states, rows, middle, inner,
    stride_s, stride_0, stride_1, stride_2,  # of outs, in UNITs: of row (i, middle, inner)
    UNIT: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,  # HEAD: d
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    m_i = tl.full([ROWS], -float("inf"), tl.float32)
    part_lse = lses + row
    for _ in range(states):
        m_i = tl.maximum(m_i, tl.load(part_lse, mask=row_mask, other=0.0))
        part_lse += rows
    base = tl.where(m_i == -float("inf"), 0.0, m_i)
    # An lse of NaN, or of +inf, makes the sum NaN, and with it all weights of its row.
    l_i = tl.zeros([ROWS], tl.float32)
    part_lse = lses + row
    for _ in range(states):
        l_i += tl.exp(tl.load(part_lse, mask=row_mask, other=0.0) - base)
        part_lse += rows
    # Nothing was seen: out 0, lse -inf.
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    if tl.program_id(1) == 0:
        tl.store(lse + row, m_i + tl.log(l_i), mask=row_mask)

    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = row_mask[:, None]
    if HEAD % BLOCK != 0:
        mask = mask & (channel < HEAD)[None, :]
    # Rows fit 32 bits, in which dividing is quick; places do not.
    start = (row // inner // middle).to(tl.int64) * stride_0
    start += (row // inner % middle).to(tl.int64) * stride_1
    start += (row % inner).to(tl.int64) * stride_2
    merged = tl.zeros([ROWS, BLOCK], tl.float32)
    part_lse = lses + row
    part = outs + start[:, None] * UNIT + channel[None, :]
    for _ in range(states):
        score = tl.load(part_lse, mask=row_mask, other=0.0)
        # What a state that saw nothing holds is not read: it may be NaN.
        some = mask & (score != -float("inf"))[:, None]
        weight = tl.exp(score - base) / l_i
        merged += tl.load(part, mask=some, other=0.0).to(tl.float32) * weight[:, None]
        part_lse += rows
        part += stride_s * UNIT
    cell = row[:, None].to(tl.int64) * HEAD + channel[None, :]
    tl.store(out + cell, merged.to(out.dtype.element_ty), mask=mask)


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """``outs`` is read where it lies if its rows are contiguous and on at most three axes."""
    states, *shape, head = outs.shape
    if lses.shape[1:].numel() >= LARGEST_ROW:
        expected = f"of fewer than {LARGEST_ROW} rows for impl='triton'"
        fail_value("merge_states", "lses", expected, lses.shape[1:].numel())
    # d = 0 leaves only lses to merge.
    if head == 0:
        return reference.merge_states(outs, lses)
    out, lse = outs.new_empty(outs.shape[1:]), lses.new_empty(shape)
    axes = _row_axes(outs)
    if axes is None:
        outs = outs.contiguous()
        axes = [(lse.numel(), head)]
    (_, stride_0), (middle, stride_1), (inner, stride_2) = [(1, 0)] * (3 - len(axes)) + axes
    strides = (outs.stride(0), stride_0, stride_1, stride_2)
    # What all rows' places are multiples of, so that the compiler knows how wide it may read.
    unit = math.gcd(ALIGNED, *strides)
    block = min(next_power_of_2(head), CHANNELS)
    rows = max(ELEMENTS // block, 1)
    launch(
        merge_all,
        (cdiv(lse.numel(), rows), cdiv(head, block)),
        outs,
        lses.contiguous(),
        out,
        lse,
        states,
        lse.numel(),
        middle,
        inner,
        *(stride // unit for stride in strides),
        device=out.device,
        warps=WARPS,
        stages=1,
        # Beside a mask of channels 8 bytes were spilled, for one more program on a multiprocessor.
        all_registers=head % block != 0,
        UNIT=unit,
        HEAD=head,
        BLOCK=block,
        ROWS=rows,
    )
    return out, lse


def _row_axes(outs: Tensor) -> list[tuple[int, int]] | None:
    """(size, stride) of the rows' axes, outermost first, those that are one taken together.

    None where rows are not contiguous, or more than three axes remain: then they are copied.
    """
    if outs.shape[-1] > 1 and outs.stride(-1) != 1:
        return None
    axes: list[tuple[int, int]] = []
    for size, stride in zip(outs.shape[1:-1], outs.stride()[1:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes if len(axes) <= 3 else None
