"""In C++, each in one pass over memory; fp32 on a CPU, nothing that records gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from astra_kernels import _C

_PLAIN = (Tensor, nn.Parameter)  # others, such as quantized ones, are more than memory


def can_run(*tensors: Tensor) -> bool:
    """Whether C++ may read the memory of these tensors, in their last dimension in order."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    for t in tensors:  # several hundred times a call of an engine, so nothing is called in between
        if type(t) not in _PLAIN or t.dtype is not torch.float32 or not t.is_cpu:
            return False
        if t.dim() and t.stride(-1) != 1 and t.shape[-1] > 1:
            return False
    return True


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    rows, threads = x.numel() // max(1, width), torch.get_num_threads()
    _C.rms_norm(x.data_ptr(), weight.data_ptr(), rows, width, eps, out.data_ptr(), threads)
    return out


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out, threads = torch.empty_like(up), torch.get_num_threads()
    _C.gated_silu(gate.data_ptr(), up.data_ptr(), up.numel(), out.data_ptr(), threads)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    shape = batch, heads, tokens, width, tokens * width if len(cos) > 1 else 0
    here, there = ((t.data_ptr(), t.stride()[:3]) for t in (x, out))
    _C.rotate(shape, here, cos.data_ptr(), sin.data_ptr(), there, torch.get_num_threads())
    return out
