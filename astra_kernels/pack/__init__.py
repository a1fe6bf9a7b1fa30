"""Bit packing: codes of 1 to 16 bits, one after the other without padding.

    packed_size(count, bits) -> int                 ceil(count * bits / 8)
    pack(codes, bits, *, out=None) -> uint8         [packed_size(codes.size, bits)]
    unpack(data, bits, count, *, out=None) -> int32 [count]

**Layout.** Code i occupies the stream bits [i*bits, (i+1)*bits), least significant bit first in
each byte; the unused high bits of the last byte are zero. These are the bytes of
`numpy.packbits(bitorder="little")` and of faiss. Eight codes take exactly `bits` bytes.

**What goes in.** Codes: int32, a torch tensor or a numpy array of any shape, read in row-major
order. Data: uint8, a tensor, an array or any contiguous buffer of bytes (bytes, bytearray,
memoryview). A non-contiguous tensor or array is copied first; everything else is read in place.

**What comes out.** A numpy array for a numpy array, a torch tensor for all else. Or `out`, written
in place and returned: a tensor, an array or any writable contiguous buffer, say a slice of a send
buffer. `out` and `data` may be longer than needed; what lies beyond is neither read nor written.

**Errors.** TypeError for a wrong type or dtype, ValueError for a wrong value or size, naming the
argument, what was expected and what came. A code outside 0..2**bits-1 is a ValueError with its
index; the output is then unspecified.

**Devices.** CUDA tensors are packed by the Triton kernels in `kernel`, where Triton is installed;
tensors elsewhere go through `reference`, plain torch operations. Neither looks at the values of
codes: bits beyond the width are dropped.

**torch.compile.** A call on tensors that is compiled, traced, transformed or seen by a dispatch
mode, or whose tensors are more than memory (fake ones, subclasses), is the op
`torch.ops.astra.pack` or `unpack`; otherwise the kernel is called directly, which costs less than
the dispatcher alone.

**Threads.** The GIL is released for calls of 32768 codes and more; a smaller call is over sooner
than the GIL would change hands.
"""

from typing import Any, NoReturn, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import _C, _dispatch
from ._checks import (
    check_data_size,
    check_dtype,
    check_input,
    check_target,
    dtype_name,
    refuse,
)
from .native import pack_tensor, unpack_tensor

__all__ = ["pack", "packed_size", "unpack"]

Out = TypeVar("Out")
Codes = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

_CPU = torch.device("cpu")
_PLAIN = (Tensor, nn.Parameter)
_INT32, _UINT8 = np.dtype(np.int32), np.dtype(np.uint8)


def packed_size(count: int, bits: int) -> int:
    """Bytes that codes take: ceil(count * bits / 8).

    Args:
        count: how many codes, 0 or more.
        bits: of a code, 1 to 16.

    Raises:
        TypeError: what is no integer.
        ValueError: a number out of range.

    Example:
        >>> ak.packed_size(300, 10)
        375
    """
    return _C.packed_size(count, bits)


@overload
def pack(codes: Tensor, bits: int, *, out: None = None) -> Tensor: ...
@overload
def pack(codes: Codes, bits: int, *, out: None = None) -> Bytes: ...
@overload
def pack(codes: Tensor | Codes, bits: int, *, out: Out) -> Out: ...
def pack(codes: Tensor | Codes, bits: int, *, out: Any = None) -> Any:
    """Packs codes into bytes without padding: code i takes the bits [i*bits, (i+1)*bits) of the
    stream, least significant bit first in each byte. The module's text says more.

    Args:
        codes: int32, a tensor or numpy array of any shape, read in row-major order.
        bits: of a code, 1 to 16.
        out: uint8, what to write to: a tensor, an array or a writable buffer of at least
            ``packed_size(codes.numel(), bits)`` bytes. None: a new one.

    Returns:
        uint8 [packed_size(codes.numel(), bits)], an array for an array, else a tensor; or ``out``.

    Raises:
        TypeError: another type or dtype.
        ValueError: ``bits`` out of range, ``out`` too small, on a CPU a code outside 0..2**bits-1.

    Example:
        >>> ak.pack(torch.tensor([1, 2, 3, 0], dtype=torch.int32), 2)  # 0b00_11_10_01
        tensor([57], dtype=torch.uint8)
    """
    if isinstance(codes, np.ndarray):
        source: Any = _array("codes", codes, _INT32)
        if out is None:
            out = np.empty(_C.packed_size(codes.size, bits), np.uint8)
    elif isinstance(codes, Tensor):
        if _is_op(codes, out):
            return _place(torch.ops.astra.pack(codes, bits), out)
        if not codes.is_cpu:
            return _pack_elsewhere(codes, bits, out)
        if out is None:
            return pack_tensor(codes, bits)
        if codes.dtype is not torch.int32 or not codes.is_contiguous():
            codes = check_input("codes", codes, torch.int32)
        source = (codes.data_ptr(), codes.numel())
    else:
        refuse("codes", "a torch tensor or numpy array of int32", codes)
    _C.pack(source, bits, _target(out, torch.uint8))
    return out


@overload
def unpack(data: Tensor, bits: int, count: int, *, out: None = None) -> Tensor: ...
@overload
def unpack(data: Bytes, bits: int, count: int, *, out: None = None) -> Codes: ...
@overload
def unpack(
    data: bytes | bytearray | memoryview, bits: int, count: int, *, out: None = None
) -> Tensor: ...
@overload
def unpack(
    data: Tensor | Bytes | bytes | bytearray | memoryview, bits: int, count: int, *, out: Out
) -> Out: ...
def unpack(data: Any, bits: int, count: int, *, out: Any = None) -> Any:
    """Unpacks codes from bytes: the inverse of ``pack``.

    Args:
        data: uint8, a tensor, array or contiguous buffer of at least ``packed_size(count, bits)``
            bytes.
        bits: of a code, 1 to 16.
        count: how many codes.
        out: int32, what to write to: a tensor, an array or a writable buffer with room for
            ``count`` codes. None: a new one.

    Returns:
        int32 [count], an array for an array, else a tensor; or ``out``.

    Raises:
        TypeError: another type or dtype.
        ValueError: a number out of range, ``data`` or ``out`` too small.

    Example:
        >>> ak.unpack(bytes([57]), 2, 4)
        tensor([1, 2, 3, 0], dtype=torch.int32)
    """
    if isinstance(data, np.ndarray):
        source: Any = _array("data", data, _UINT8)
        if out is None:
            check_data_size(data.size, _C.packed_size(count, bits), bits, count)
            out = np.empty(count, np.int32)
    elif isinstance(data, Tensor):
        if _is_op(data, out):
            return _place(torch.ops.astra.unpack(data, bits, count), out)
        if not data.is_cpu:
            return _unpack_elsewhere(data, bits, count, out)
        if out is None:
            return unpack_tensor(data, bits, count)
        if data.dtype is not torch.uint8 or not data.is_contiguous():
            data = check_input("data", data, torch.uint8)
        source = (data.data_ptr(), data.numel())
    else:
        source = data
        if out is None:
            check_data_size(_buffer_size(data), _C.packed_size(count, bits), bits, count)
            out = torch.empty(count, dtype=torch.int32, device=_CPU)
        elif isinstance(data, tuple):
            _refuse_data(data)
    _C.unpack(source, bits, count, _target(out, torch.int32))
    return out


def _is_op(tensor: Tensor, out: Any) -> bool:
    """Whether what is done with a tensor is somebody's to see, or it is more than its memory."""
    if is_compiling():  # to buffers it writes between two graphs
        return out is None or isinstance(out, Tensor)
    is_buffer = out is not None and not isinstance(out, Tensor)  # whose bytes no mode can see
    seen = torch._C._len_torch_dispatch_stack() > 0 and not is_buffer
    followed = type(tensor) not in _PLAIN or seen
    followed = followed or torch._C._functorch.peek_interpreter_stack() is not None
    return followed or torch._C._get_tracing_state() is not None


def _array(name: str, array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if array.dtype is not dtype and array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {array.dtype}")
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _buffer_size(data: Any) -> int:
    try:
        return memoryview(data).nbytes
    except TypeError:
        _refuse_data(data)


def _refuse_data(data: object) -> NoReturn:
    refuse("data", "a torch tensor, numpy array or buffer of uint8", data)


def _target(out: Any, dtype: torch.dtype) -> Any:
    """What the native module writes to: it checks sizes and buffers, and we check tensors."""
    if isinstance(out, np.ndarray):
        return out
    if isinstance(out, Tensor):
        if out.dtype is not dtype or not out.is_cpu or not out.is_contiguous():
            check_target(out, dtype, _CPU)
        if type(out) not in _PLAIN:
            refuse("out", "a torch.Tensor, as what goes in has memory", out)
        return (out.data_ptr(), out.numel())
    if isinstance(out, tuple):
        refuse("out", f"a tensor, array or writable buffer of {dtype_name(dtype)}", out)
    return out


def _pack_elsewhere(codes: Tensor, bits: int, out: Any) -> Any:
    check_dtype("codes", codes, torch.int32)
    _C.packed_size(codes.numel(), bits)  # for its checks
    return _place(_dispatch.packing(codes.device).pack(codes, bits), out)


def _unpack_elsewhere(data: Tensor, bits: int, count: int, out: Any) -> Any:
    check_dtype("data", data, torch.uint8)
    check_data_size(data.numel(), _C.packed_size(count, bits), bits, count)
    return _place(_dispatch.packing(data.device).unpack(data, bits, count), out)


def _place(result: Tensor, out: Any) -> Any:
    if out is None:
        return result
    if not isinstance(out, Tensor):
        refuse("out", f"a tensor on {result.device} as the input is", out)
    check_target(out, result.dtype, result.device)
    if out.numel() < result.numel():
        raise ValueError(f"out must hold at least {result.numel()} elements, got {out.numel()}")
    out.view(-1)[: result.numel()].copy_(result)
    return out
