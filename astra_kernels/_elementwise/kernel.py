"""What a block computes between its products, each in one pass over memory, in Triton.

Rounded where torch's formulas round: each operation of 16-bit tensors has a 16-bit result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from astra_kernels._triton.arguments import rows_contiguous
from astra_kernels._triton.launch import cdiv, launch, next_power_of_2

ELEMENTS = 2048  # of a program elsewhere
WARPS = 4


@triton.jit(do_not_specialize=["eps"])
def norm_rows(
    x, weight, out, eps,  # [T, D], [D]
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight · x / √(mean x² + eps); a program owns a row."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * CHANNELS
    channel = tl.arange(0, BLOCK)
    mask = channel < CHANNELS
    values = tl.load(x + row + channel, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(values * values, 0) / CHANNELS
    scaled = (values * tl.rsqrt(mean + eps)).to(DTYPE).to(tl.float32)
    tl.store(out + row + channel, (gain * scaled).to(DTYPE), mask=mask)


@triton.jit
def gate(gates, ups, out, count, BLOCK: tl.constexpr):
    """silu(gate) · up of [count] numbers each."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < count
    x = tl.load(gates + offset, mask=mask, other=0.0).to(tl.float32)
    silu = (x / (1.0 + tl.exp(-x))).to(DTYPE).to(tl.float32)
    up = tl.load(ups + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, (silu * up).to(DTYPE), mask=mask)


@triton.jit
def turned(here, there, turn_cos, turn_sin, DTYPE: tl.constexpr):
    """A half of a rotated row: itself times cos and, with its sign, the other half times sin."""
    stays = (here * turn_cos).to(DTYPE).to(tl.float32)
    turns = (there * turn_sin).to(DTYPE).to(tl.float32)
    return (stays + turns).to(DTYPE)


@triton.jit(do_not_specialize=["tokens"])
def rotate_rows(
    x, x_b, x_h, x_n, out, out_b, out_h, out_n,  # [B, H, N, d], channels in order
    cos, sin, angles_b, tokens,  # [B or 1, N, d]; N
    HEAD: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,  # d; of a program; d/2 padded
):  # fmt: skip
    """x·cos + [-b, a]·sin with x = [a, b] in halves; a program owns TOKENS tokens of a head."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    HALF: tl.constexpr = HEAD // 2
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (token < tokens) & (channel < HALF)
    x += batch * x_b + head * x_h + token * x_n + channel
    one = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = batch * angles_b + token * HEAD + channel
    cos_1 = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + HALF, mask=mask, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + angle + HALF, mask=mask, other=0.0).to(tl.float32)
    out += batch * out_b + head * out_h + token * out_n + channel
    tl.store(out, turned(one, -two, cos_1, sin_1, DTYPE), mask=mask)
    tl.store(out + HALF, turned(two, one, cos_2, sin_2, DTYPE), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D]; a row's channels are those of a program."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    width = x.shape[-1]
    block = next_power_of_2(width)
    launch(
        norm_rows,
        (x.numel() // width,),
        *(x, weight, out, float(eps)),
        device=x.device,
        warps=min(16, max(1, block // 512)),
        stages=1,
        CHANNELS=width,
        BLOCK=block,
    )
    return out


def gated_silu(gates: Tensor, ups: Tensor) -> Tensor:
    gates, ups = gates.contiguous(), ups.contiguous()
    out = torch.empty_like(ups)
    if out.numel() == 0:
        return out
    launch(
        gate,
        (cdiv(out.numel(), ELEMENTS),),
        *(gates, ups, out, out.numel()),
        device=out.device,
        warps=WARPS,
        stages=1,
        BLOCK=ELEMENTS,
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, N, d], cos and sin [B or 1, N, d]; in x's order in memory."""
    x, cos, sin = rows_contiguous(x), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    batch, heads, tokens, width = x.shape
    block = max(8, next_power_of_2(width // 2))
    rows = max(1, ELEMENTS // (2 * block))
    launch(
        rotate_rows,
        (cdiv(tokens, rows), heads, batch),
        *(x, *x.stride()[:3], out, *out.stride()[:3]),
        *(cos, sin, tokens * width if cos.shape[0] > 1 else 0, tokens),
        device=x.device,
        warps=WARPS,
        stages=1,
        HEAD=width,
        TOKENS=rows,
        BLOCK=block,
    )
    return out
