"""Attention over codes on a CPU in C++: lookup and rotation in the loop, a tile at a time.

Packed codes are read where they lie; neither keys nor values are ever there as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from astra_kernels import _C
from astra_kernels._checks import CodedShape, check_code_values
from astra_kernels._checks.arguments import MAX_CODE_BITS, MAX_CODEWORDS
from astra_kernels._plain import is_plain
from astra_kernels._rotary import Rope
from astra_kernels.attention.native import (
    HAS_ROUNDED,
    STORED,
    address_of,
    plain_call,
    prepare,
    serves,
)
from astra_kernels.pack.native import unpack_tensor

if TYPE_CHECKING:
    from astra_kernels._C import CodedKeys, CodeTable, TokenCodes

# Whether it is of attention to codes as well; an extension that was built before stays usable.
HAS_ROUNDED_CODES = HAS_ROUNDED and "rounded" in (_C.coded_attention.__doc__ or "")


def coded_attention(
    query: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    value_codes: Tensor | None = None,
    scale: float | None = None,
    rope: Rope | None = None,
    code_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    code_bits: int | None = None,
    shape: CodedShape | None = None,
    isa: str = "",
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """`shape` is needed where codes are packed.

    rounded: products may be of numbers rounded to bf16, where these are quicker.
    """
    op = "coded_attention"
    width = value_codebook.shape[-3] * value_codebook.shape[-1]
    call = prepare(op, query, key_codebook.shape[-4], width, scale, sinks)
    coded = Coded(
        codes, key_codebook, value_codebook, value_codes, rope, code_mask, code_bits, shape
    )
    storage: Any = call.storage
    more: Any = {"rounded": True} if rounded and HAS_ROUNDED_CODES else {}
    found = _C.coded_attention(
        call.shape, call.query, coded.keys, *call.rest, isa, *storage, **more
    )
    coded.refuse(op, found)
    return call.state(query.dtype)


def plain_coded_attention(
    query: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    code_bits: int | None,
    num_tokens: int | None,
    scale: float | None,
    cos: Tensor | None,
    sin: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor] | None:
    """`astra_kernels.coded_attention` of fp32 tensors on a CPU that fit; None: anything else, and
    where a code is out of range. As `plain_attention`."""
    if not (scale is None or type(scale) is float) or not is_plain(codes, dtype=None):
        return None
    tables = (key_codebook, value_codebook)
    if not is_plain(query, *tables, cos, sin) or query.ndim != 4 or query.stride(3) != 1:
        return None
    batch, heads, _, dim = query.shape
    sizes = key_codebook.shape
    if len(sizes) != 4 or value_codebook.shape[:3] != sizes[:3] or value_codebook.ndim != 4:
        return None
    kv_heads, groups, codewords, part = sizes
    width = groups * value_codebook.shape[3]
    if 0 in query.shape or 0 in sizes or not width or heads % kv_heads or groups * part != dim:
        return None
    tokens, per_token = _count(codes, batch, (kv_heads * groups, groups), code_bits, num_tokens)
    if not tokens or codewords > MAX_CODEWORDS:
        return None
    rope: Rope | None = None
    if cos is not None and sin is not None:
        if not (cos.shape == sin.shape == (tokens, dim)) or dim % 2:
            return None
        rope = cos, sin
    if not all(t.is_contiguous() for t in (codes, *tables, *(rope or ()))):
        return None
    # Codes of keys that are not rotated may be counted instead, see cpu.py.
    if impl != "native" and not (impl == "auto" and rope and serves(query.dtype)):
        return None
    bits = 0 if code_bits is None else code_bits
    own = (codes.data_ptr(), bits, per_token, codes.stride(0) if batch > 1 else 0)
    angles = (0, 0) if rope is None else (rope[0].data_ptr(), rope[1].data_ptr())
    table, value_table = ((t.data_ptr(), 1, groups, codewords) for t in tables)
    keys = (tokens, own, table, own, value_table, *angles, 0, 0)
    call = plain_call(query, kv_heads, width, scale)
    found = _C.coded_attention(call.shape, call.query, keys, *call.rest)
    return None if found else (call.out, call.lse)


def _count(
    codes: Tensor, batch: int, choices: tuple[int, int], bits: int | None, tokens: int | None
) -> tuple[int, int]:
    """How many tokens there are, and how many codes each has; (0, 0) where that is not plain."""
    if bits is None:
        fit = codes.dtype is torch.int32 and codes.ndim == 3 and codes.shape[0] == batch
        if not fit or codes.shape[2] not in choices or tokens not in (None, codes.shape[1]):
            return 0, 0
        return codes.shape[1], codes.shape[2]
    if codes.dtype is not torch.uint8 or codes.ndim != 2 or codes.shape[0] != batch:
        return 0, 0
    if type(bits) is not int or not 1 <= bits <= MAX_CODE_BITS or type(tokens) is not int:
        return 0, 0
    size = codes.shape[1]
    fitting = (c for c in choices if tokens > 0 and (tokens * c * bits + 7) // 8 == size)
    per_token = next(fitting, 0)
    return (tokens, per_token) if per_token else (0, 0)


class Coded:
    """The coded side of a call, which holds its memory."""

    def __init__(
        self,
        codes: Tensor,
        key_codebook: Tensor,
        value_codebook: Tensor,
        value_codes: Tensor | None,
        rope: Rope | None,
        code_mask: Tensor | None,
        code_bits: int | None,
        shape: CodedShape | None,
    ) -> None:
        self._bits, self._mask = code_bits, code_mask
        codes = _readable(codes)
        self._codes = [codes, codes if value_codes is None else _readable(value_codes)]
        self._tables = [x.float().contiguous() for x in (key_codebook, value_codebook)]
        if shape is None:
            self._per_token = [x.shape[2] for x in self._codes]
            tokens = codes.shape[1]
        else:
            self._per_token = [shape.key_codes, shape.value_codes]
            tokens = shape.tokens
        cos, sin = (None, None) if rope is None else _readable_angles(rope)
        mask = None if code_mask is None else code_mask.contiguous()
        self._held = (cos, sin, mask)
        alike = cos is None or cos.ndim == 2 or cos.shape[0] == 1
        keys = (
            tokens,
            self._codes_of(0),
            _table_of(self._tables[0]),
            self._codes_of(1),
            _table_of(self._tables[1]),
            address_of(cos),
            address_of(sin),
            0 if cos is None or alike else cos.stride(0),
            address_of(mask),
        )
        storage = () if cos is None else STORED[cos.dtype]
        self.keys: CodedKeys = (*keys, storage[0]) if storage else keys

    def _codes_of(self, which: int) -> TokenCodes:
        codes = self._codes[which]
        bits = 0 if self._bits is None else self._bits
        stride = codes.stride(0) if codes.shape[0] > 1 else 0
        return codes.data_ptr(), bits, self._per_token[which], stride

    def refuse(self, op: str, found: int) -> None:
        """`found`: what the kernel says of the codes."""
        if found == 0:
            return
        which = found - 1
        codes = self._codes[which]
        name = "codes" if codes is self._codes[0] else "value_codes"
        if self._bits is not None:
            count = self.keys[0] * self._per_token[which]
            rows = [unpack_tensor(row, self._bits, count) for row in codes]
            codes = torch.stack(rows).view(len(rows), self.keys[0], -1)
        check_code_values(op, name, codes, self._tables[which].shape[-2], self._mask)
        raise AssertionError("the kernel met a code that the check does not find")


def _readable(codes: Tensor) -> Tensor:
    """int32, or packed bytes; larger integers are not cut to ones that a table has."""
    if codes.dtype == torch.int64:
        codes = codes.clamp(-1, 2**31 - 1).int()
    return codes.contiguous()


def _readable_angles(rope: Rope) -> Rope:
    """Contiguous, both stored alike and as the kernel reads them."""
    cos, sin = rope
    if cos.dtype not in STORED or sin.dtype != cos.dtype:
        cos, sin = cos.float(), sin.float()
    return cos.contiguous(), sin.contiguous()


def _table_of(table: Tensor) -> CodeTable:
    stages = table.shape[0] if table.ndim == 5 else 1
    return table.data_ptr(), stages, table.shape[-3], table.shape[-2]
