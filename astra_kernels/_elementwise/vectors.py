"""What a sender codes of keys and values, in one pass over both, in Triton."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from astra_kernels._triton.arguments import rows_contiguous
from astra_kernels._triton.launch import cdiv, launch, next_power_of_2

WARPS = 4
ELEMENTS = 2048  # of a program's keys, and as many values


@triton.jit
def is_finite(x):
    """False of NaN, too."""
    return tl.abs(x) < float("inf")


@triton.jit
def stored(x, out, LARGEST: tl.constexpr):
    """Within reach of the type that is stored, where that is narrower than fp32."""
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    return x.to(out.dtype.element_ty)


@triton.jit
def turned_back(here, there, cos, sin, angle, mask):
    """A half of a row before it was rotated: by the negative angle, over its squared length."""
    turn_cos = tl.load(cos + angle, mask=mask, other=1.0).to(tl.float32)
    turn_sin = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
    length = turn_cos * turn_cos + turn_sin * turn_sin
    return (here * turn_cos + there * turn_sin) / length


@triton.jit
def place_of(
    channel, head,
    HEADS: tl.constexpr, HEAD: tl.constexpr, PART: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Where a key's channels are in a token's vectors; its value's are PART behind."""
    if SHARED:
        place = (channel // PART * HEADS + head) * (2 * PART) + channel % PART
    elif PART == HEAD:
        place = head * (2 * PART) + channel
    else:
        place = (head * (HEAD // PART) + channel // PART) * (2 * PART) + channel % PART
    return place


@triton.jit(do_not_specialize=["tokens"])
def pair_vectors(
    key, key_b, key_h, key_t, value, value_b, value_h, value_t,  # [B, Hkv, T, d], channels in order
    cos, sin, angles_b, angles_t,  # [B, T, d]
    scales, out, finite, tokens,  # [Hkv, 2]; [B, T, C, w]; uint8 [programs]
    HEADS: tl.constexpr, HEAD: tl.constexpr, PART: tl.constexpr,  # Hkv, d, d/S
    SHARED: tl.constexpr, ROTARY: tl.constexpr, LARGEST: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,  # of a program; d padded, d/2 where it is rotary
):  # fmt: skip
    """A program owns TOKENS tokens of a head."""
    REACH: tl.constexpr = HEAD // 2 if ROTARY else HEAD
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (token < tokens) & (channel < REACH)
    key += batch * key_b + head.to(tl.int64) * key_h + token * key_t + channel
    value += batch * value_b + head.to(tl.int64) * value_h + token * value_t + channel
    out += (batch * tokens + token) * (2 * HEADS * HEAD)
    key_scale, value_scale = tl.load(scales + 2 * head), tl.load(scales + 2 * head + 1)
    here = tl.load(key, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(value, mask=mask, other=0.0).to(tl.float32)
    fine = is_finite(here) & is_finite(values)
    place = place_of(channel, head, HEADS, HEAD, PART, SHARED)
    tl.store(out + place + PART, stored(values * value_scale, out, LARGEST), mask=mask)
    if ROTARY:
        there = tl.load(key + REACH, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(value + REACH, mask=mask, other=0.0).to(tl.float32)
        fine = fine & is_finite(there) & is_finite(values)
        angle = batch * angles_b + token * angles_t + channel
        one = turned_back(here, there, cos, sin, angle, mask)
        two = turned_back(there, -here, cos, sin, angle + REACH, mask)
        tl.store(out + place, stored(one * key_scale, out, LARGEST), mask=mask)
        place = place_of(channel + REACH, head, HEADS, HEAD, PART, SHARED)
        tl.store(out + place, stored(two * key_scale, out, LARGEST), mask=mask)
        tl.store(out + place + PART, stored(values * value_scale, out, LARGEST), mask=mask)
    else:
        tl.store(out + place, stored(here * key_scale, out, LARGEST), mask=mask)
    program = (tl.program_id(2) * HEADS + head) * tl.num_programs(0) + tl.program_id(0)
    whole = tl.min(tl.min(tl.where(fine, 1, 0), 1), 0)
    tl.store(finite + program, whole.to(tl.uint8))


def key_value_vectors(
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scales: Tensor,
    parts: int,
    shared: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See ``_elementwise.key_value_vectors``."""
    batch, heads, tokens, width = key.shape
    groups, channels = (parts, heads) if shared else (heads * parts, 1)
    out = key.new_empty((batch, tokens, groups, 2 * width // parts * channels), dtype=dtype)
    reach = width if cos is None else width // 2
    block = max(8, next_power_of_2(reach))
    rows = max(1, ELEMENTS // (block * (width // reach)))
    grid = (cdiv(tokens, rows), heads, batch)
    finite = key.new_empty(math.prod(grid), dtype=torch.uint8)  # by program: none waits for zeros
    if out.numel() == 0:
        return out, finite
    key, value = rows_contiguous(key), rows_contiguous(value)
    angles_b = angles_t = 0
    if cos is not None and sin is not None:
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        angles_b = cos.stride(0) if cos.shape[0] > 1 else 0
        angles_t = cos.stride(1)
    launch(
        pair_vectors,
        grid,
        *(key, *key.stride()[:3], value, *value.stride()[:3], cos, sin, angles_b, angles_t),
        *(scales, out, finite, tokens),
        device=key.device,
        warps=WARPS,
        stages=1,
        HEADS=heads,
        HEAD=width,
        PART=width // parts,
        SHARED=shared,
        ROTARY=cos is not None,
        LARGEST=torch.finfo(dtype).max,
        TOKENS=rows,
        BLOCK=block,
    )
    return out, finite
