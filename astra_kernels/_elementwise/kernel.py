"""What a sender codes of keys and values, in one pass over both, in Triton."""

from __future__ import annotations

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


@triton.jit(do_not_specialize=["key_b", "value_b", "angles_b", "tokens"])
def pair_vectors(
    key, key_b, key_h, key_t, value, value_b, value_h, value_t,  # [B, Hkv, T, d], channels in order
    cos, sin, angles_b, angles_t,  # [B, T, d]
    scales, out, finite, tokens,  # [Hkv, 2]; [B, T, C, w]; uint8 []
    HEADS: tl.constexpr, HEAD: tl.constexpr, PART: tl.constexpr,  # Hkv, d, d/S
    SHARED: tl.constexpr, ROTARY: tl.constexpr, LARGEST: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,  # of a program; d padded
):  # fmt: skip
    """A program owns TOKENS tokens of a head."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (token < tokens) & (channel < HEAD)
    rows = key + batch * key_b + head.to(tl.int64) * key_h + token * key_t
    keys = tl.load(rows + channel, mask=mask, other=0.0).to(tl.float32)
    fine = is_finite(keys)
    if ROTARY:
        # The rotation by the negative angle, over its squared length.
        HALF: tl.constexpr = HEAD // 2
        first = channel < HALF
        other = tl.where(first, channel + HALF, channel - HALF)
        others = tl.load(rows + other, mask=mask, other=0.0).to(tl.float32)
        angle = batch * angles_b + token * angles_t + channel
        turn_cos = tl.load(cos + angle, mask=mask, other=1.0).to(tl.float32)
        turn_sin = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
        length = turn_cos * turn_cos + turn_sin * turn_sin
        keys = (keys * turn_cos + tl.where(first, others, -others) * turn_sin) / length
    rows = value + batch * value_b + head.to(tl.int64) * value_h + token * value_t
    values = tl.load(rows + channel, mask=mask, other=0.0).to(tl.float32)
    fine = fine & is_finite(values)
    part = channel // PART
    GROUPS: tl.constexpr = HEAD // PART
    if SHARED:
        place = (part * HEADS + head) * (2 * PART) + channel % PART
    else:
        place = (head * GROUPS + part) * (2 * PART) + channel % PART
    place += (batch * tokens + token) * (2 * HEADS * HEAD)
    keys *= tl.load(scales + 2 * head)
    values *= tl.load(scales + 2 * head + 1)
    tl.store(out + place, stored(keys, out, LARGEST), mask=mask)
    tl.store(out + place + PART, stored(values, out, LARGEST), mask=mask)
    wrong = tl.max(tl.max(tl.where(fine, 0, 1), 1), 0)
    if wrong > 0:
        tl.store(finite, 0)


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
    finite = torch.ones((), dtype=torch.uint8, device=key.device)
    if out.numel() == 0:
        return out, finite
    key, value = rows_contiguous(key), rows_contiguous(value)
    angles_b = angles_t = 0
    if cos is not None and sin is not None:
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        angles_b = cos.stride(0) if cos.shape[0] > 1 else 0
        angles_t = cos.stride(1)
    block = max(16, next_power_of_2(width))
    rows = max(1, ELEMENTS // block)
    launch(
        pair_vectors,
        (cdiv(tokens, rows), heads, batch),
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
