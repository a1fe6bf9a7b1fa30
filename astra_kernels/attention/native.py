"""Dense attention on a CPU in C++: products, softmax and the sum over values, tile by tile.

What the C++ kernels of all attention ops are told is put together here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from astra_kernels import _C
from astra_kernels._plain import is_plain
from astra_kernels.attention.blocks import new_state

if TYPE_CHECKING:
    from astra_kernels._C import DenseKeys, Heads, Shape

# Instruction sets with which the kernel was measured beside torch's flash kernel: it is faster for
# one query and a thousand, one key and thousands (bench/native.py).
MEASURED = ("avx2", "avx512")
# An extension that was built before this kernel stays usable: a development tree is not rebuilt by
# every change of csrc/.
_SERVES = hasattr(_C, "mixed_attention") and _C.attention_isas()[-1] in MEASURED
# Whether products of numbers rounded to bf16 are quicker here.
HAS_ROUNDED = hasattr(_C, "attention_rounds") and _C.attention_rounds()
# What the kernel reads and writes as it is stored, tile by tile, and how it is told so.
STORED: dict[torch.dtype, tuple[int, ...]] = {torch.float32: ()}
if hasattr(_C, "attention_dtypes"):
    for _number, _name in enumerate(_C.attention_dtypes()[1:], start=1):
        STORED[getattr(torch, _name)] = (_number,)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    isa: str = "",
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `astra_kernels.attention`.

    isa: one of `_C.attention_isas()`; "": the widest.
    rounded: products may be of numbers rounded to bf16, where these are quicker.
    """
    call = prepare("attention", query, key.shape[1], value.shape[3], scale, sinks)
    dense = Dense(key, value, is_causal, key_mask)
    storage: Any = call.storage
    more: Any = {"rounded": True} if rounded and HAS_ROUNDED else {}
    _C.attention(call.shape, call.query, dense.keys, *call.rest, isa, *storage, **more)
    return call.state(query.dtype)


_CPU = torch.device("cpu")


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    impl: str,
) -> tuple[Tensor, Tensor] | None:
    """`astra_kernels.attention` of fp32 tensors on a CPU that fit; None: anything else.

    It asks for no more than what decides whether the kernel may run, which is half the time of a
    short call: what it turns down goes the long way, and gets its error there.
    """
    if impl != "native" and not (impl == "auto" and _SERVES):
        return None
    if type(is_causal) is not bool or not (scale is None or type(scale) is float):
        return None
    if not is_plain(query, key, value):
        return None
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if not (len(shape) == len(key_shape) == len(value_shape) == 4):
        return None
    batch, heads, rows, dim = shape
    _, kv_heads, tokens, width = value_shape
    if key_shape != (batch, kv_heads, tokens, dim) or value_shape[0] != batch:
        return None
    if 0 in shape or 0 in value_shape or heads % kv_heads or (is_causal and rows > tokens):
        return None
    key_strides, value_strides = key.stride(), value.stride()
    if query.stride(3) != 1 or key_strides[3] != 1 or value_strides[3] != 1:
        return None
    dense = (
        tokens,
        (key.data_ptr(), key_strides[:3]),
        (value.data_ptr(), value_strides[:3]),
        0,
        is_causal,
    )
    call = plain_call(query, kv_heads, width, scale)
    _C.attention(call.shape, call.query, dense, *call.rest)
    return call.out, call.lse


def plain_call(query: Tensor, kv_heads: int, width: int, scale: float | None) -> Call:
    """`prepare` for fp32 queries on a CPU that may be read as they lie, without sinks."""
    batch, heads, rows, dim = query.shape
    strides = (rows * heads * width, width, heads * width, 1)
    out = torch.empty_strided(
        (batch, heads, rows, width), strides, dtype=torch.float32, device=_CPU
    )
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=_CPU)
    scale = dim**-0.5 if scale is None else scale
    rest = ((out.data_ptr(), strides[:3]), lse.data_ptr(), scale, 0, torch.get_num_threads())
    shape = (batch, heads, kv_heads, rows, dim, width)
    return Call((), out, lse, shape, (query.data_ptr(), query.stride()[:3]), rest, ())


def serves(dtype: torch.dtype) -> bool:
    """Whether `impl="auto"` takes this kernel for what it knows."""
    return dtype != torch.float64 and _SERVES


class Call(NamedTuple):
    """The queries and outputs of a call. The tensors hold the memory that addresses point to."""

    tensors: tuple[Tensor | None, ...]
    out: Tensor
    lse: Tensor
    shape: Shape
    query: Heads
    rest: tuple[Heads, int, float, int, int]
    storage: tuple[int, ...]  # of query, out, and dense keys and values; nothing for fp32

    def state(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out = self.out
        return (out if out.dtype == dtype else out.to(dtype)), self.lse


def prepare(
    op: str, query: Tensor, kv_heads: int, width: int, scale: float | None, sinks: Tensor | None
) -> Call:
    """`width`: of the values."""
    if query.dtype == torch.float64:
        raise RuntimeError(
            f"astra_kernels.{op}: impl='native' cannot run: the C++ kernel takes float32, float16 "
            "and bfloat16, not float64; impl='auto' takes what there is"
        )
    query = in_rows(query)
    sinks = None if sinks is None else sinks.float().contiguous()
    out, lse = new_state(query, width)
    batch, heads, rows, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    shape = (batch, heads, kv_heads, rows, dim, width)
    rest = (heads_of(out), lse.data_ptr(), scale, address_of(sinks), torch.get_num_threads())
    return Call((query, sinks), out, lse, shape, heads_of(query), rest, STORED[query.dtype])


class Dense:
    """The dense side of a call, which holds its memory."""

    def __init__(
        self, key: Tensor, value: Tensor, is_causal: bool, key_mask: Tensor | None
    ) -> None:
        key, value = in_rows(key), in_rows(value)
        mask = None if key_mask is None else key_mask.contiguous()
        self._held = (key, value, mask)
        self.keys: DenseKeys = (
            key.shape[2],
            heads_of(key),
            heads_of(value),
            address_of(mask),
            is_causal,
        )


def in_rows(tensor: Tensor) -> Tensor:
    """As the kernel reads it, with adjacent channels; a copy only where it must be."""
    if tensor.dtype not in STORED:
        tensor = tensor.float()
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def heads_of(tensor: Tensor) -> Heads:
    return tensor.data_ptr(), tensor.stride()[:3]


def address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
