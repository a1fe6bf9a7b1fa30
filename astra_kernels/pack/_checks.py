"""What tensors may be passed to the packing functions, said once.

Integers, sizes and buffers that are no tensors are checked by the native module.
"""

from typing import NoReturn

import torch
from torch import Tensor


def check_input(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the dtype on the CPU, of any shape and strides -> its elements, contiguous."""
    if not isinstance(tensor, Tensor):
        refuse(name, f"a torch tensor of {dtype_name(dtype)}", tensor)
    check_dtype(name, tensor, dtype)
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "a nested one" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor (layout torch.strided), got {layout}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got a tensor on {tensor.device}")
    return tensor.contiguous()


def check_target(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """An `out` tensor that can be written to in place."""
    check_dtype("out", tensor, dtype)
    if tensor.device != device:
        raise ValueError(f"out must be on {device} as the input is, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {tensor.stride()}")


def check_data_size(size: int, needed: int, bits: int, count: int) -> None:
    """Before an output is allocated for it: a count from the wire may be anything."""
    if size < needed:
        what = f"{count} codes of {bits} bit{'s' if bits > 1 else ''}"
        raise ValueError(f"data must hold at least {needed} bytes for {what}, got {size}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype_name(dtype)}, got {dtype_name(tensor.dtype)}")


def refuse(name: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"{name} must be {expected}, got {type(got).__name__}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
