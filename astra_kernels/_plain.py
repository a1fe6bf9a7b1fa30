"""Which calls are so plain that torch's dispatcher would add nothing but its time.

A call of one query takes a few microseconds in C++, and twenty to be found there: the dispatcher
goes to Python and back for it. Whoever records, traces or transforms operations has to see them,
so those calls go through it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from astra_kernels import _replay as replay

_TENSORS = (Tensor, nn.Parameter)  # others, such as quantized ones, are more than memory


def is_plain(*tensors: Tensor | None, dtype: torch.dtype | None = torch.float32) -> bool:
    """Whether C++ may read the memory of these tensors and nobody would miss the operation.

    dtype: of all of them; None: any.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._profiler_enabled():
        return False
    graded = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _TENSORS or not tensor.is_cpu or tensor.is_nested:
            return False
        if dtype is not None and tensor.dtype is not dtype:
            return False
        if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
            return False
        if graded and tensor.requires_grad:
            return False
        if tensor._is_zerotensor():  # zeros that torch has written nowhere, of a gradient, say
            return False
    return replay.is_unwatched()
