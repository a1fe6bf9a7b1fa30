"""Two partial softmaxes become one in Triton, in one pass over the outputs as they are stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from astra_kernels._checks import fail_value
from astra_kernels._triton.launch import cdiv, launch, next_power_of_2

WARPS = 4
CHANNELS = 1024  # of one program at most
LARGEST_ROW = 2**31 - 1  # rows are numbered with 32 bits
ELEMENTS = 2048  # of one program: two or four 16-byte reads a thread and side


@triton.jit(do_not_specialize=["rows", "middle", "inner", "lse_0", "lse_1", "lse_2"])
def merge_rows(
    out_a, lse_a, out_b, lse_b, out, lse,  # outs [rows, d]
    rows, middle, inner, lse_0, lse_1, lse_2,  # row (i, middle, inner) has its lse at these strides
    HEAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,  # d
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    offset = row // inner // middle * lse_0 + row // inner % middle * lse_1 + row % inner * lse_2
    side_a = tl.load(lse_a + offset, mask=row_mask, other=-float("inf"))
    side_b = tl.load(lse_b + offset, mask=row_mask, other=-float("inf"))
    m_i = tl.maximum(side_a, side_b)
    base = tl.where(m_i == -float("inf"), 0.0, m_i)
    weight_a = tl.exp(side_a - base)
    weight_b = tl.exp(side_b - base)
    l_i = weight_a + weight_b
    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # both empty: out 0, lse -inf
    if tl.program_id(1) == 0:
        tl.store(lse + offset, m_i + tl.log(l_i), mask=row_mask)

    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cell = row[:, None].to(tl.int64) * HEAD + channel[None, :]
    mask = row_mask[:, None]
    if HEAD % BLOCK != 0:
        mask = mask & (channel < HEAD)[None, :]
    # What an empty side holds is not read: it may be NaN.
    some_a = mask & (side_a != -float("inf"))[:, None]
    some_b = mask & (side_b != -float("inf"))[:, None]
    part_a = tl.load(out_a + cell, mask=some_a, other=0.0).to(tl.float32)
    part_b = tl.load(out_b + cell, mask=some_b, other=0.0).to(tl.float32)
    merged = part_a * (weight_a / l_i)[:, None] + part_b * (weight_b / l_i)[:, None]
    tl.store(out + cell, merged.to(out.dtype.element_ty), mask=mask)


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """out has out_a's layout where its rows are contiguous, else it is contiguous."""
    if lse_a.numel() >= LARGEST_ROW:
        expected = f"of fewer than {LARGEST_ROW} rows for impl='triton'"
        fail_value("merge_state", "lse_a", expected, lse_a.numel())
    out = torch.empty_like(out_a)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    axes = _row_axes(out, lse)
    if axes is None:
        out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
        axes = [(lse.numel(), 1)]
    if out.numel() == 0:  # d = 0 leaves only lse to merge
        return out, torch.logaddexp(lse_a, lse_b, out=lse)
    axes += [(1, 0)] * (3 - len(axes))
    (_, outer_stride), (middle, middle_stride), (inner, inner_stride) = axes
    head = out.shape[-1]
    block = min(next_power_of_2(head), CHANNELS)
    rows = max(ELEMENTS // block, 1)
    launch(
        merge_rows,
        (cdiv(lse.numel(), rows), cdiv(head, block)),
        _stored_like(out_a, out),
        lse_a.contiguous(),
        _stored_like(out_b, out),
        lse_b.contiguous(),
        out,
        lse,
        lse.numel(),
        middle,
        inner,
        outer_stride,
        middle_stride,
        inner_stride,
        device=out.device,
        warps=WARPS,
        stages=1,
        HEAD=head,
        BLOCK=block,
        ROWS=rows,
    )
    return out, lse


def _row_axes(out: Tensor, lse: Tensor) -> list[tuple[int, int]] | None:
    """(size, stride in lse) of the rows' axes, outermost first as ``out`` stores them.

    Axes that are one in both are taken together. None where rows are not contiguous, or more than
    three axes remain: then they are copied.
    """
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        return None
    axes = [
        (out.stride(axis), lse.shape[axis], lse.stride(axis))
        for axis in range(lse.ndim)
        if lse.shape[axis] > 1
    ]
    merged: list[tuple[int, int]] = []
    for _, size, stride in sorted(axes, reverse=True):
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged if len(merged) <= 3 else None


def _stored_like(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like).copy_(tensor)
