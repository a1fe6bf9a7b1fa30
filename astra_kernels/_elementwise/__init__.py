"""What a Transformer block computes between its products, each in one pass over memory.

As torch has them, these are four to eight passes each, an eighth of a small Llama's time on one
core; on a GPU five to ten launches. C++ serves fp32 on a CPU, Triton what lies on a GPU; for other
dtypes and gradients there are the formulas in `reference.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from astra_kernels import _replay as replay
from astra_kernels._dispatch import runs_triton
from astra_kernels._elementwise import native, reference

# Of a row that a program of Triton's holds.
MOST_CHANNELS: Final = 16_384

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, nn.Parameter)  # others, such as quantized ones, are more than memory


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean x² + eps), with the mean over the last dimension.

    Args:
        x: [..., D]. weight: [D]. Both fp32 for the C++; others by the formula, in x's dtype,
            rounded where it rounds.
    """
    if native.can_run(x, weight) and weight.shape == x.shape[-1:]:
        return native.rms_norm(x, weight, eps)
    if on_gpu(x, weight) and weight.shape == x.shape[-1:] and x.shape[-1] <= MOST_CHANNELS:
        normed: Tensor = _triton("rms_norm")(x, weight, eps)
        return normed
    return reference.rms_norm(x, weight, eps)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up with silu(x) = x / (1 + exp(-x)): the gate of a SwiGLU MLP.

    Args:
        gate, up: of one shape and dtype.
    """
    if native.can_run(gate, up) and gate.shape == up.shape:
        return native.gated_silu(gate, up)
    if on_gpu(gate, up) and gate.shape == up.shape:
        gated: Tensor = _triton("gated_silu")(gate, up)
        return gated
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
    if fits and not width % 2 and on_gpu(x, cos, sin):
        rotated: Tensor = _triton("rotate")(x, cos, sin)
    else:
        rotated = reference.rotate(x, cos, sin)
    return rotated if out is None else out.copy_(rotated)


def key_value_vectors(
    key: Tensor,
    value: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    scales: Tensor,
    parts: int,
    shared: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """Keys and values as the vectors that are coded: keys turned back, both scaled, in groups.

    A group's vector is its d/S channels of a key and then of its value; with ``shared`` these of
    every KV head, one after the other. All is computed in fp32.

    Args:
        key, value: [B, Hkv, T, d], of one dtype; the keys are rotated by ``rope``, (cos, sin), each
            [B or 1, T, d], if any.
        scales: fp32 [Hkv, 2], of keys and of values.
        parts: S, into how many groups the channels of a head are split.
        dtype: of the vectors; what is beyond its largest number becomes that.

    Returns:
        [B, T, Hkv*S, 2*d/S], or [B, T, S, Hkv*2*d/S] with ``shared``, and bools on the
        device: keys and values are finite where all of them are. None where no Triton kernel runs.
    """
    if not runs_triton(key.device):
        return None
    cos, sin = rope or (None, None)
    vectors, finite = _triton("key_value_vectors")(
        key, value, cos, sin, scales, parts, shared, dtype
    )
    return vectors, finite.view(torch.bool)


def on_gpu(*tensors: Tensor) -> bool:
    """Whether Triton may read the memory of these tensors, of one dtype: nothing that records
    gradients."""
    first = tensors[0]
    if not first.is_cuda or torch.is_grad_enabled() or first.dtype not in _DTYPES:
        return False
    if torch._C._are_functorch_transforms_active() or not runs_triton(first.device):
        return False
    return all(type(t) in _PLAIN and t.dtype is first.dtype and t.is_cuda for t in tensors)


@functools.cache
def _triton(name: str) -> Callable[..., Any]:
    module = "vectors" if name == "key_value_vectors" else "kernel"
    kernels = importlib.import_module(f"astra_kernels._elementwise.{module}")
    return replay.kept(name, getattr(kernels, name))
