"""What a Transformer block computes between its products, each in one pass over memory.

As torch has them, these are four to eight passes each, an eighth of a small Llama's time on one
core. Where the C++ does not serve (another dtype or device, gradients), they are the formulas in
`reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels._elementwise import native, reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean x² + eps), with the mean over the last dimension.

    Args:
        x: [..., D]. weight: [D]. Both fp32 for the C++; others by the formula, in x's dtype.
    """
    if native.can_run(x, weight) and weight.shape == x.shape[-1:]:
        return native.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up with silu(x) = x / (1 + exp(-x)): the gate of a SwiGLU MLP.

    Args:
        gate, up: of one shape and dtype.
    """
    if native.can_run(gate, up) and gate.shape == up.shape:
        return native.gated_silu(gate, up)
    return reference.gated_silu(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotary positions, rotate-half convention: x·cos + [-b, a]·sin with x = [a, b] in halves.

    Args:
        x: [B, H, N, d], d even. cos, sin: [B or 1, N, d]. All of one dtype.
        out: written to, of x's shape; may be x. None: a new one, with x's order in memory.

    Returns:
        out.
    """
    batch, _, tokens, width = x.shape
    fits = cos.shape == sin.shape and cos.shape[1:] == (tokens, width) and len(cos) in (1, batch)
    if fits and not width % 2 and native.can_run(x, cos, sin, *(() if out is None else (out,))):
        return native.rotate(x, cos, sin, torch.empty_like(x) if out is None else out)
    rotated = reference.rotate(x, cos, sin)
    return rotated if out is None else out.copy_(rotated)
