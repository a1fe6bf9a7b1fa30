"""Tensors as the attention kernels take them: strides, masks, angles, words of packed codes.

Offsets within a batch row, a table or a mask's row are 32-bit in the kernels. What is farther apart
only because of what lies between is copied; what is larger itself is refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from astra_kernels._triton.blocks import NATURAL
from astra_kernels._triton.launch import next_power_of_2
from astra_kernels._triton.packed import as_words
from astra_kernels._triton.sources import Coded, Counted, Dense

LARGEST_OFFSET = 2**31
SMALLEST_SCALE = 2.0**-126


def padded(channels: int) -> int:
    """Matrix instructions take powers of two, from 16 on."""
    return max(16, next_power_of_2(channels))


def scale_and_sign(scale: float, units: int) -> tuple[float, float]:
    """A positive scale, by which the largest score stays the largest, and its sign.

    In base 2 unless scores are natural. Zero becomes the smallest normal number, which no hidden
    key's score of -inf turns into NaN.
    """
    size = abs(scale) * (1.0 if units == NATURAL else math.log2(math.e))
    if not math.isnan(size):  # which stays what it is
        size = max(size, SMALLEST_SCALE)
    return size, math.copysign(1.0, scale)


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
    check_offsets(mask, axes=1)
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


def dense_arguments(dense: Dense | None) -> tuple[Any, ...]:
    """The kernel's arguments from ``key`` to ``key_mask``, strides in elements."""
    if dense is None:
        return (None, 0, 0, 0, None, 0, 0, 0, None)
    key, value = rows_contiguous(dense.key), rows_contiguous(dense.value)
    mask = None if dense.mask is None else dense.mask.contiguous()
    check_offsets(key, value)
    return (key, *key.stride()[:3], value, *value.stride()[:3], mask)


def stride_unit(query: Tensor, dense: Dense | None) -> int:
    """What divides all strides, up to 16 elements: so wide the compiler knows that it may read."""
    strides = list(query.stride()[:3])
    if dense is not None:
        for tensor in (dense.key, dense.value):
            strides += rows_contiguous(tensor).stride()[:3]
    return math.gcd(16, *strides)


def remote_arguments(
    coded: Coded | None, counted: Counted | None, few_rows: bool
) -> tuple[Any, ...]:
    """The kernel's arguments from ``codes`` to ``bias_h``."""
    if counted is not None:
        return _counted_arguments(counted, few_rows)
    if coded is None:
        return (None, 0, None, 0, None, None, None, None, 0, None, None, 0, 0)
    codes, value_codes = as_words(coded.codes, coded.bits), None
    if coded.value_codes is not coded.codes:
        value_codes = as_words(coded.value_codes, coded.bits)
    tables = [coded.key_table.contiguous(), coded.value_table.contiguous()]
    cos, sin = coded.rope or (None, None)
    if cos is not None and sin is not None:
        if cos.shape != sin.shape:  # one is the same for all batch rows
            cos, sin = torch.broadcast_tensors(cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        check_offsets(cos, axes=2)
    angles_b = cos.stride(0) if cos is not None and cos.ndim == 3 and cos.shape[0] > 1 else 0
    mask = None if coded.mask is None else coded.mask.contiguous()
    check_offsets(*tables, axes=5)
    check_offsets(codes, codes if value_codes is None else value_codes, bits=coded.bits)
    return (
        *(codes, codes.stride(0)),
        *(value_codes, 0 if value_codes is None else value_codes.stride(0), *tables),
        *(cos, sin, angles_b, mask, None, 0, 0),
    )


def _counted_arguments(counted: Counted, few_rows: bool) -> tuple[Any, ...]:
    tables = [table.contiguous() for table in counted[1:]]
    check_offsets(*tables, axes=4)
    bias = counted.counts
    if not few_rows or bias.dtype != torch.int32 or bias.stride(-1) != 1:
        # Once for all programs: in the kernel a logarithm costs as much as all else on a score.
        bias = bias.new_empty(bias.shape, dtype=torch.float32)
        torch.log2(counted.counts, out=bias)
    bias_arguments = (bias, bias.stride(0), bias.stride(1) if bias.shape[1] > 1 else 0)
    return (None, 0, None, 0, *tables, None, None, 0, None, *bias_arguments)


def rows_contiguous(x: Tensor) -> Tensor:
    """Channels one after the other, rows within reach of 32 bits: other views are copied."""
    fine = (x.stride(-1) == 1 or x.shape[-1] == 1) and _reach(x, x.ndim - 1) < LARGEST_OFFSET
    return x if fine else x.contiguous()


def _reach(x: Tensor, axes: int) -> int:
    """Elements from the first to the last one along the last axes."""
    sizes = zip(x.shape[-axes:], x.stride()[-axes:], strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sizes)


def check_offsets(*tensors: Tensor, axes: int | None = None, bits: int | None = None) -> None:
    """Offsets within a batch row (or as many of the last ``axes``) are 32-bit, in bits of codes."""
    for tensor in tensors:
        steps = _reach(tensor, axes or tensor.ndim - 1) * (32 if bits else 1)
        if steps >= LARGEST_OFFSET:
            raise ValueError(
                f"astra_kernels: a batch row or table of {LARGEST_OFFSET} elements or more is too "
                f"large for impl='triton', got shape {list(tensor.shape)}"
            )
