"""Ops as an engine calls them, some of them hundreds of times a call: straight to their C++.

Torch's dispatcher and the checks of arguments cost some ten microseconds each, and more where a
model's weights have just gone through the caches. They are left out where a call is of the plain
kind: dense fp32 on a CPU, shapes that fit, nothing that records gradients or traces. Any other
call goes to the public op, with its answers and its errors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import astra_kernels as ak
from astra_kernels import _C
from astra_kernels._elementwise.native import can_run
from astra_kernels._library.registration import KERNELS
from astra_kernels.attention import native as attention_native
from astra_kernels.coded_attention import native as coded_native
from astra_kernels.coded_attention.cpu import looks_up
from astra_kernels.encode import native as encode_native
from astra_kernels.encode.cpu import NATIVE_WIDTH
from astra_kernels.quantized_linear import native as quantized_linear_native
from astra_kernels.quantized_linear._checks import SCALES, check_quantized_linear

# An extension that was built before these stays usable.
_HAS_MERGE, _HAS_FINITE = hasattr(_C, "merge_into"), hasattr(_C, "all_finite")
_HAS_LOOK_UP = hasattr(_C, "look_up")
_HAS_ADD_ROWS = hasattr(_C, "add_rows")
_HAS_LINEARS = hasattr(_C, "quantized_linears")
# Measured with AVX-512 alone, beside the product of MKL.
HAS_PRODUCT = hasattr(_C, "product") and _C.product_isa() == "avx512"
_ROUNDS = hasattr(_C, "product_rounds") and _C.product_rounds()
_HAS_ADD = HAS_PRODUCT and hasattr(_C, "product_suits_many_rows")
# Whether calls that allow products of rounded numbers get them.
MAY_ROUND = os.environ.get("ASTRA_ROUND", "1") != "0"
HAS_VNNI = hasattr(_C, "linear_isas") and _C.linear_isas()[-1] == "avx512vnni"
LEAST_ROWS = 4  # with fewer, reading the weights takes all the time
# With more, MKL's product is as fast where it has AVX-512 as well, which it uses on Intel's
# processors alone.
MOST_ROWS = sys.maxsize if _HAS_ADD and _C.product_suits_many_rows() else 192


def rounds_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attention` that may round does so, for tensors such as these."""
    rounds = attention_native.HAS_ROUNDED and MAY_ROUND
    return rounds and device.type == "cpu" and dtype is torch.float32


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float,
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """`ak.attention`: (out [B, H, M, d], lse [B, H, M]) of [B, H, M, d] and [B, Hkv, L, d].

    rounded: keys and values are good to a few bits, so products may be of numbers rounded to bf16,
    where the processor multiplies these at twice the rate.
    """
    plain = key_mask is None and attention_native.serves(query.dtype) and not _is_traced()
    if plain and can_run(query, key, value) and _fit(query, key, value, is_causal):
        return attention_native.attention(
            query, key, value, is_causal=is_causal, scale=scale, rounded=rounded and MAY_ROUND
        )
    return ak.attention(query, key, value, is_causal=is_causal, key_mask=key_mask, scale=scale)


def _fit(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> bool:
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        return False
    batch, heads, rows, width = query.shape
    same = key.shape[0] == batch and key.shape[3] == width
    kv_heads, tokens = key.shape[1], key.shape[2]
    return same and kv_heads > 0 and heads % kv_heads == 0 and not (is_causal and rows > tokens)


def coded_attention(
    query: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    rope: tuple[Tensor, Tensor] | None,
    code_mask: Tensor | None,
    code_bits: int | None,
    num_tokens: int | None,
    scale: float,
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """`ak.coded_attention`; shapes and values of codes are checked here as well.

    rounded: as in `attention`, of codewords, where codes are looked up in C++.
    """
    floats = (query, key_codebook, value_codebook, *(rope or ()))
    if codes.is_cpu and not _is_traced() and can_run(*floats):
        sizes = (codes.shape[1], codes.shape[-1])
        quicker = rounded and MAY_ROUND and coded_native.HAS_ROUNDED_CODES
        if quicker and code_bits is None and looks_up(query, sizes, key_codebook, rope, None):
            return coded_native.coded_attention(
                *(query, codes, key_codebook, value_codebook),
                scale=scale,
                rope=rope,
                code_mask=code_mask,
                rounded=True,
            )
        cos, sin = rope or (None, None)
        state: tuple[Tensor, Tensor] = KERNELS["coded_attention"](
            *(query, codes, key_codebook, value_codebook, None, code_bits, num_tokens, cos, sin),
            *(code_mask, None, scale, None, None, "auto", None),
        )
        return state
    return ak.coded_attention(
        query,
        codes,
        key_codebook,
        value_codebook,
        rope=rope,
        code_mask=code_mask,
        code_bits=code_bits,
        num_tokens=num_tokens,
        scale=scale,
    )


def linear(vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` for few rows: [..., out] of [..., in] and weights [out, in]."""
    plain = HAS_PRODUCT and vectors.dim() > 0 and weight.dim() == 2 and weight.is_contiguous()
    fit = plain and vectors.shape[-1] == weight.shape[1]
    biases = () if bias is None else (bias,)
    fit = fit and all(b.shape == weight.shape[:1] for b in biases)
    if not fit or _is_traced() or not can_run(vectors, weight, *biases):
        return F.linear(vectors, weight, bias)
    outputs, inputs = weight.shape
    x = vectors.contiguous()
    out = x.new_empty((*x.shape[:-1], outputs))
    _C.product(
        *(x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr()),
        *(x.numel() // max(1, inputs), inputs, outputs, out.data_ptr(), torch.get_num_threads()),
    )
    return out


class MayRound(NamedTuple):
    """A matrix that `affine` may round to bf16: fp32 [K, N] as `columns_first` has it, and its
    rounded columns, bf16 [N, K rounded up to an even number]; None where these are no quicker."""

    matrix: Tensor
    rounded: Tensor | None


def may_round(matrix: Tensor) -> MayRound:
    """`matrix` [K, N], whose products need no more than bf16's eight bits."""
    rounded = None
    if matrix.is_cpu and _ROUNDS and MAY_ROUND:
        rounded = F.pad(matrix.T, (0, matrix.shape[0] % 2)).to(torch.bfloat16).contiguous()
    return MayRound(columns_first(matrix), rounded)


def columns_first(matrix: Tensor) -> Tensor:
    """The same [K, N] with columns that lie in one piece, as `affine` reads them."""
    return matrix.T.contiguous().T


def affine(
    start: Tensor, x: Tensor, matrix: Tensor | MayRound, *, in_place: bool = False
) -> Tensor:
    """start + x·matrix, [M, N], of x [M, K] and [K, N]. `start` is [N]; or [M, N] and, `in_place`,
    may be written to."""
    matrix, rounded = matrix if isinstance(matrix, MayRound) else (matrix, None)
    rows, columns = x.shape[0], matrix.T
    outputs = columns.shape[0]
    shape = (rows, outputs) if in_place else (outputs,)
    plain = _HAS_ADD and LEAST_ROWS <= rows <= MOST_ROWS and x.shape[1:] == columns.shape[1:]
    plain = plain and all(t.is_contiguous() for t in (start, x, columns)) and start.shape == shape
    if not plain or _is_traced() or not can_run(start, x, columns):
        into = start if in_place and not torch.is_grad_enabled() else None
        return torch.addmm(start, x, matrix, out=into)
    out = start if in_place else x.new_empty(rows, outputs)
    bias = 0 if in_place else start.data_ptr()
    weights, more = columns if rounded is None else rounded, {}
    if rounded is not None:
        more["rounded"] = True  # an older extension has no such argument
    _C.product(
        *(x.data_ptr(), weights.data_ptr(), bias, rows, x.shape[1], outputs, out.data_ptr()),
        torch.get_num_threads(),
        add=in_place,
        **more,
    )
    return out


def quantized_linear(
    vectors: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`ak.quantized_linear`; shapes are checked here as well."""
    if weight.is_cpu and not _is_traced() and can_run(vectors):
        check_quantized_linear(vectors, weight, scale, minimum, bias)
        return quantized_linear_native.quantized_linear(vectors, weight, scale, minimum, bias)
    return ak.quantized_linear(vectors, weight, scale, minimum=minimum, bias=bias)


def quantized_linears(vectors: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """`quantized_linear` of several layers with the same input, which is rounded once; None: they
    have to be asked one by one.

    layers: with `weight`, `scale`, `minimum` and `bias`, as `quantized_linear` takes them.
    """
    if not _HAS_LINEARS or _is_traced() or not can_run(vectors):
        return None
    groups = layers[0].scale.shape[-1]
    for layer in layers:
        given = (layer.weight, layer.scale, layer.minimum, layer.bias)
        biased = layer.bias is not None and layer.bias.dtype is not torch.float32
        if layer.scale.dtype not in SCALES or biased:  # a model that was converted
            return None
        check_quantized_linear(vectors, *given)
        plain = layer.weight.is_cpu and layer.scale.shape[-1] == groups
        if not plain or not all(t is None or t.is_contiguous() for t in given):
            return None
    return quantized_linear_native.quantized_linears(vectors, layers)


def merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, first: int) -> Tensor:
    """`ak.merge_state` of out [B, H, M, d] from row `first` on and other [B, H, M - first, d].

    Returns the merged outs of all rows, [B, H, M, d]; what `out` and `lse` hold afterwards is
    unspecified, as they may be written to.
    """
    given = (out, lse, other, other_lse)
    batch, heads, rows, width = out.shape
    shape = (batch, heads, rows - first, width)
    fit = other.shape == shape and lse.shape == (batch, heads, rows)
    fit = fit and other_lse.shape == shape[:3]
    if _HAS_MERGE and fit and not _is_traced() and can_run(*given):
        one = (_place(out, first), _place(lse, first))
        theirs = (_place(other), _place(other_lse))
        _C.merge_into(shape, one, theirs, torch.get_num_threads())
        return out
    if not first:
        return ak.merge_state(out, lse, other, other_lse)[0]
    merged, _ = ak.merge_state(out[:, :, first:], lse[:, :, first:], other, other_lse)
    return torch.cat([out[:, :, :first], merged], 2)


def all_finite(tensors: Sequence[Tensor]) -> bool | None:
    """Whether tensors of up to four dimensions hold neither NaN nor an infinity; None: the C++ does
    not serve."""
    if not _HAS_FINITE or _is_traced() or not can_run(*tensors):
        return None
    if any(tensor.dim() > 4 for tensor in tensors):
        return None
    return all(_C.all_finite(_four(t.shape, 1), (t.data_ptr(), _strides(t))) for t in tensors)


def encode(vectors: Tensor, codebook: Tensor, half_norms: Tensor | None = None) -> Tensor:
    """`ak.encode`: int32 [..., C] of vectors [..., C, w] by codewords [C, K, w]."""
    fit = vectors.shape[-2:] == codebook.shape[::2] and 0 < codebook.shape[2] <= NATIVE_WIDTH
    if fit and codebook.dim() == 3 and not _is_traced() and can_run(vectors, codebook):
        return encode_native.encode(vectors, codebook)
    return ak.encode(vectors, codebook, half_norms=half_norms)


def decode(codes: Tensor, codebook: Tensor) -> Tensor:
    """`ak.decode`: [..., C, w] of codes int32 [..., C], which were found or checked before."""
    fit = codebook.dim() == 3 and codes.shape[-1:] == codebook.shape[:1]
    plain = fit and codes.dtype is torch.int32 and codes.is_cpu and codes.is_contiguous()
    if _HAS_LOOK_UP and plain and not _is_traced() and can_run(codebook):
        groups, codewords, width = codebook.shape
        out, tables = codebook.new_empty((*codes.shape, width)), codebook.contiguous()
        shape = (codes.numel() // max(1, groups), groups, codewords, width)
        if _C.look_up(shape, codes.data_ptr(), tables.data_ptr(), out.data_ptr()):
            return out
    return ak.decode(codes, codebook)  # names the code that there is no codeword of


def adds_rows(device: torch.device) -> bool:
    """Whether there is `add_rows` for tensors there, and it may be used."""
    return _HAS_ADD_ROWS and MAY_ROUND and device.type == "cpu"


def add_rows(out: Tensor, codes: Tensor, tables: Tensor) -> Tensor:
    """Adds to each row of `out`, fp32 [M, E], the sum of tables[c, codes[:, c]], in place.

    codes: int32 [M, C]; those below 0 add nothing. tables: bfloat16 [C, K, E]. All contiguous.

    Raises:
        IndexError: a code that there is no row of.
    """
    groups, codewords, width = tables.shape
    shapes = out.shape == (len(codes), width) and codes.shape[1:] == (groups,)
    kinds = (out.dtype, codes.dtype, tables.dtype) == (torch.float32, torch.int32, torch.bfloat16)
    assert shapes, "rows and tables of other shapes"
    assert kinds, "not of the kinds that tables have"
    assert all(t.is_contiguous() for t in (out, codes, tables))
    shape = (len(codes), groups, codewords, width)
    addresses = codes.data_ptr(), tables.data_ptr(), out.data_ptr()
    if not _C.add_rows(shape, *addresses, torch.get_num_threads()):
        raise IndexError(f"codes: expected less than {codewords}, got {int(codes.max())}")
    return out


def _place(tensor: Tensor, first: int = 0) -> tuple[int, tuple[int, int, int]]:
    """Where rows from `first` on begin, and the strides of batch, head and row."""
    batch, head, row = tensor.stride()[:3]
    return tensor.data_ptr() + first * row * tensor.itemsize, (batch, head, row)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return _four(tensor.stride(), 0)[:3]


def _four(sizes: tuple[int, ...], filler: int) -> tuple[int, int, int, int]:
    """Of a tensor of up to four dimensions, as if it had so many."""
    first, second, third, last = (filler,) * (4 - len(sizes)) + tuple(sizes)
    return first, second, third, last


def _is_traced() -> bool:
    """Whether somebody follows the operations of this thread, or differentiates forwards."""
    compiles = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return compiles or forward_ad._current_level >= 0
