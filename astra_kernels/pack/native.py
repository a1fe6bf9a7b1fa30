"""Packing of torch CPU tensors by the C++ kernels: tensors in, a new tensor out, nothing else.

These are the bodies of the `torch.library` ops; `astra_kernels.pack` is what people call. Each is
called twice a Transformer block on payloads of kilobytes, so the usual case is recognized first and
the checks that explain come after.
"""

import torch
from torch import Tensor

from .._C import pack as _pack
from .._C import packed_size as _packed_size
from .._C import unpack as _unpack
from ._checks import check_data_size, check_input

# A lookup in `torch` costs as much as a check.
_empty, _int32, _uint8, _cpu = torch.empty, torch.int32, torch.uint8, torch.device("cpu")


def pack_tensor(codes: Tensor, bits: int) -> Tensor:
    """Codes int32 of any shape, on the CPU -> uint8 [ceil(codes.numel() * bits / 8)]."""
    if codes.dtype is not _int32 or not codes.is_cpu or not codes.is_contiguous():
        codes = check_input("codes", codes, _int32)
    count = codes.numel()
    size = _packed_size(count, bits)
    out = _empty(size, dtype=_uint8, device=_cpu)
    _pack((codes.data_ptr(), count), bits, (out.data_ptr(), size))
    return out


def unpack_tensor(data: Tensor, bits: int, count: int) -> Tensor:
    """Data uint8 of at least ceil(count * bits / 8) elements, on the CPU -> int32 [count]."""
    if data.dtype is not _uint8 or not data.is_cpu or not data.is_contiguous():
        data = check_input("data", data, _uint8)
    size = data.numel()
    check_data_size(size, _packed_size(count, bits), bits, count)
    out = _empty(count, dtype=_int32, device=_cpu)
    _unpack((data.data_ptr(), size), bits, count, (out.data_ptr(), count))
    return out
