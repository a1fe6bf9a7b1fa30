"""Which calls of an op pass through torch's autograd layer."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def undifferentiated(*tensors: Tensor | None) -> contextlib.AbstractContextManager[object]:
    """A context for calling an op of ours: where no gradient is asked for, it leaves out torch's
    autograd layer in Python, which would cost as much as the op's own checks."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return contextlib.nullcontext()
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowADInplaceOrView()
