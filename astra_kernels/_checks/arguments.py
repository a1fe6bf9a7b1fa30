"""What every argument is checked for: type, dtype, shape, device, and gradients it cannot have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CODES = (torch.int32, torch.int64)
MAX_CODEWORDS = 65536
MAX_CODE_BITS = 16


def fail_value(op: str, name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"astra_kernels.{op}: {name} must be {expected}, got {got}")


def fail_type(op: str, name: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"astra_kernels.{op}: {name} must be {expected}, got {got}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def shape_of(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}"


def check_tensors(
    op: str,
    optional: Mapping[str, object] | None = None,
    *,
    differentiable: bool = False,
    **values: object,
) -> None:
    """Dense tensors, in ``optional`` or None, without a derivative that would be lost silently.

    Left to torch, the first would be a RuntimeError about a schema, and the last be zeros. A
    ``differentiable`` op has gradients; no op has forward-mode derivatives.
    """
    given = values
    if optional:
        given = values | {name: value for name, value in optional.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            what = "a torch.Tensor" if name in values else "a torch.Tensor or None"
            fail_type(op, name, what, type(value).__name__)
        if value.is_nested or value.layout is not torch.strided:
            layout = "a nested tensor" if value.is_nested else str(value.layout)
            fail_type(op, name, "a dense tensor (layout torch.strided)", layout)
    if not torch.compiler.is_compiling():
        _refuse_transforms(op, given, differentiable)


def _refuse_transforms(op: str, tensors: Mapping[str, object], differentiable: bool) -> None:
    """Derivatives of torch.func and of forward mode, which requires_grad does not show."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if forward_ad._current_level < 0 and (differentiable or not transformed):
        return
    for name, value in tensors.items():
        assert isinstance(value, Tensor)
        if _has_tangent(value):
            raise RuntimeError(
                f"astra_kernels.{op} has no forward-mode derivative, but {name} is differentiated "
                f"in forward mode: use astra_kernels.{op}.reference"
            )
        if not differentiable and _has_gradient(value):
            raise RuntimeError(
                f"astra_kernels.{op} is forward-only, but {name} is differentiated by torch.func: "
                f"use the differentiable astra_kernels.{op}.reference"
            )


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor of torch.func, and what it wraps."""
    yield tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        yield tensor


def _has_tangent(tensor: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(layer).tangent is not None for layer in _layers(tensor))


def _has_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and any(layer.requires_grad for layer in _layers(tensor))


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def check_scale(op: str, scale: object) -> None:
    """The scale of scores: a number, or None."""
    if scale is not None and not _is_number(scale):
        fail_type(op, "scale", "a number or None", type(scale).__name__)


def check_softcap(op: str, softcap: object) -> None:
    """A positive number, or None: no cap."""
    if softcap is None:
        return
    if not _is_number(softcap):
        fail_type(op, "softcap", "a positive number or None", type(softcap).__name__)
    assert isinstance(softcap, float | int)
    if not 0 < softcap < float("inf"):
        fail_value(op, "softcap", "a positive number or None (no cap)", softcap)


MOST_TOKENS = 1 << 62


def check_window(op: str, window: object) -> None:
    """(left, right), integers; -1 is no limit."""
    if window is None:
        return
    if not isinstance(window, tuple | list) or len(window) != 2:
        fail_type(op, "window", "a pair (left, right) of integers or None", repr(window))
    for side in window:
        if not isinstance(side, int | torch.SymInt) or isinstance(side, bool):
            fail_type(op, "window", "a pair (left, right) of integers or None", repr(window))
        if side < -1 or (isinstance(side, int) and side > MOST_TOKENS):
            expected = "of sides from -1 (no limit) to 2**62"
            fail_value(op, "window", expected, tuple(window))


def split_rope(op: str, rope: object) -> tuple[Tensor | None, Tensor | None]:
    if rope is None:
        return None, None
    if not isinstance(rope, tuple | list) or len(rope) != 2:
        fail_type(op, "rope", "a pair (cos, sin) of tensors", type(rope).__name__)
    cos, sin = rope
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor):
        fail_type(op, "rope", "a pair (cos, sin) of tensors", type(cos).__name__)
    return cos, sin


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        fail_type(op, name, f"of dtype {_names(allowed)}", _names((tensor.dtype,)))


def check_ndim(op: str, name: str, tensor: Tensor, dims: str) -> None:
    """``dims`` names the axes, as in ``"B, H, M, d"``."""
    if tensor.ndim != dims.count(",") + 1:
        fail_value(op, name, f"[{dims}]", shape_of(tensor))


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        fail_value(op, name, f"on {device} like the other tensors", tensor.device)


def check_forward_only(op: str, **tensors: Tensor | None) -> None:
    """An op without a backward refuses to cut a gradient silently."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"astra_kernels.{op} is forward-only, but {name} requires grad: call it under "
                f"torch.no_grad() or torch.inference_mode(), or train with the differentiable "
                f"astra_kernels.{op}.reference"
            )
