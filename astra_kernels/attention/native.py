"""Dense attention on a CPU in C++: products, softmax and the sum over values, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _C
from astra_kernels.attention.cpu import new_state

Heads = tuple[int, tuple[int, ...]]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """As `astra_kernels.attention`, in fp32. `isa`: of `_C.attention_isas()`; "": the widest."""
    refuse_float64("attention", query)
    dtype = query.dtype
    query, key, value = (in_rows(x) for x in (query, key, value))
    mask = None if key_mask is None else key_mask.contiguous()
    out, lse = new_state(query)
    batch, heads, rows, dim = query.shape
    _C.attention(
        (batch, heads, key.shape[1], rows, dim),
        heads_of(query),
        key.shape[2],
        heads_of(key),
        heads_of(value),
        0 if mask is None else mask.data_ptr(),
        is_causal,
        heads_of(out),
        lse.data_ptr(),
        dim**-0.5 if scale is None else scale,
        torch.get_num_threads(),
        isa,
    )
    return out.to(dtype), lse


def refuse_float64(op: str, query: Tensor) -> None:
    if query.dtype == torch.float64:
        raise RuntimeError(
            f"astra_kernels.{op}: impl='native' cannot run: the C++ kernel takes float32, float16 "
            "and bfloat16, not float64; impl='auto' takes what there is"
        )


def in_rows(tensor: Tensor) -> Tensor:
    """In fp32, with adjacent channels; a copy only where it must be."""
    tensor = tensor.float()
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def heads_of(tensor: Tensor) -> Heads:
    """What the C++ kernel wants to know of [B, H, rows, d]."""
    return tensor.data_ptr(), tensor.stride()[:3]
