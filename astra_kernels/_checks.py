"""Every rejection of bad input: the argument's name, what was expected, what came.

The checks run inside the op (real and fake kernel alike), so a graph that was compiled or exported
for one shape cannot carry another past them. They return the sizes that the kernels need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CODES = (torch.int32, torch.int64)
COUNTS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
MAX_CODEWORDS = 65536
MAX_CODE_BITS = 16


class TableShape(NamedTuple):
    """Sizes of a codebook ``[R, Hkv, S, K, d/S]`` (R = 1 where the axis is left out)."""

    stages: int
    kv_heads: int
    groups: int
    codewords: int


class CodedInput(NamedTuple):
    """The coded side of a call, as the ops' schemas have it."""

    codes: Tensor
    key_codebook: Tensor
    value_codebook: Tensor
    value_codes: Tensor | None
    code_bits: int | None
    num_tokens: int | None
    cos: Tensor | None
    sin: Tensor | None
    consecutive: bool  # whether rows of cos and sin are those of consecutive positions
    code_mask: Tensor | None


class CodedShape(NamedTuple):
    """Sizes of the coded side of a call."""

    tokens: int
    key_codes: int  # C of codes
    value_codes: int  # C of value_codes
    key_codewords: int
    value_codewords: int


def fail_value(op: str, name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"astra_kernels.{op}: {name} must be {expected}, got {got}")


def fail_type(op: str, name: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"astra_kernels.{op}: {name} must be {expected}, got {got}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def shape_of(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}"


def check_tensors(op: str, optional: Mapping[str, object] | None = None, **values: object) -> None:
    """Dense tensors, in ``optional`` or None, without a gradient that would be cut silently.

    Left to torch, the first would be a RuntimeError about a schema, and the last be zeros.
    """
    given = {name: value for name, value in (optional or {}).items() if value is not None}
    for name, value in {**values, **given}.items():
        if not isinstance(value, Tensor):
            what = "a torch.Tensor" if name in values else "a torch.Tensor or None"
            fail_type(op, name, what, type(value).__name__)
        if value.is_nested or value.layout is not torch.strided:
            layout = "a nested tensor" if value.is_nested else str(value.layout)
            fail_type(op, name, "a dense tensor (layout torch.strided)", layout)
    if not torch.compiler.is_compiling():
        _refuse_transforms(op, {**values, **given})


def _refuse_transforms(op: str, tensors: Mapping[str, object]) -> None:
    """Gradients of torch.func and of forward mode, which requires_grad does not show in the op."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if not transformed and forward_ad._current_level < 0:
        return
    for name, value in tensors.items():
        assert isinstance(value, Tensor)
        if _is_differentiated(value):
            raise RuntimeError(
                f"astra_kernels.{op} is forward-only, but {name} is differentiated, by torch.func "
                f"or in forward mode: use the differentiable astra_kernels.{op}.reference"
            )


def _is_differentiated(tensor: Tensor) -> bool:
    while True:
        if torch.is_grad_enabled() and tensor.requires_grad:
            return True
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            return True
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)


def check_scale(op: str, scale: object) -> None:
    """The scale of scores: a number, or None."""
    number = isinstance(scale, float | int) and not isinstance(scale, bool)
    if scale is not None and not number:
        fail_type(op, "scale", "a number or None", type(scale).__name__)


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
    """The ops have no backward: refuse to cut a gradient silently."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"astra_kernels.{op} is forward-only, but {name} requires grad: call it under "
                f"torch.no_grad() or torch.inference_mode(), or train with the differentiable "
                f"astra_kernels.{op}.reference"
            )


def check_query(op: str, query: Tensor) -> None:
    check_dtype(op, "query", query, FLOATING)
    check_ndim(op, "query", query, "B, H, M, d")


def _check_heads(op: str, query: Tensor, name: str, kv_heads: int) -> None:
    heads = query.shape[1]
    if kv_heads < 1 or heads % kv_heads != 0:
        fail_value(op, name, f"for a number of KV heads that divides H = {heads}", kv_heads)


def check_dense(
    op: str, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, key_mask: Tensor | None
) -> None:
    for name, tensor in (("key", key), ("value", value)):
        check_dtype(op, name, tensor, (query.dtype,))
        check_ndim(op, name, tensor, "B, Hkv, L, d")
        if tensor.shape[0] != query.shape[0] or tensor.shape[3] != query.shape[3]:
            expected = f"[{query.shape[0]}, Hkv, L, {query.shape[3]}] (B and d of query)"
            fail_value(op, name, expected, shape_of(tensor))
    if key.shape != value.shape:
        fail_value(op, "value", f"of key's shape {list(key.shape)}", shape_of(value))
    _check_heads(op, query, "key", key.shape[1])
    if is_causal and query.shape[2] > key.shape[2]:
        expected = f"at least M = {query.shape[2]} tokens long when is_causal"
        fail_value(op, "key", expected, f"L = {key.shape[2]}")
    if key_mask is not None:
        check_mask(op, "key_mask", key_mask, key.shape[0], key.shape[2])
        check_device(op, "key_mask", key_mask, query.device)
    check_device(op, "key", key, query.device)
    check_device(op, "value", value, query.device)


def check_mask(op: str, name: str, mask: Tensor, batch: int, tokens: int) -> None:
    check_dtype(op, name, mask, (torch.bool,))
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] != tokens:
        fail_value(op, name, f"[{batch}, {tokens}] (True = visible)", shape_of(mask))


def _check_rope(op: str, cos: Tensor, sin: Tensor, batch: int, tokens: int, dim: int) -> None:
    if dim % 2 != 0:
        fail_value(op, "rope", "left out when d is odd (rotate-half pairs channels)", f"d = {dim}")
    for name, tensor in (("rope cos", cos), ("rope sin", sin)):
        check_dtype(op, name, tensor, FLOATING)
        fits = tensor.ndim in (2, 3) and tensor.shape[-2] == tokens and tensor.shape[-1] == dim
        if not fits or (tensor.ndim == 3 and tensor.shape[0] not in (1, batch)):
            expected = f"[{tokens}, {dim}] or [{batch}, {tokens}, {dim}]"
            fail_value(op, name, expected, shape_of(tensor))


def _table_shape(op: str, name: str, table: Tensor, dim: int) -> TableShape:
    check_dtype(op, name, table, FLOATING)
    if table.ndim not in (4, 5):
        fail_value(op, name, "[Hkv, S, K, d/S] or [R, Hkv, S, K, d/S]", shape_of(table))
    kv_heads, groups, codewords, width = table.shape[-4:]
    stages = table.shape[0] if table.ndim == 5 else 1
    if groups * width != dim:
        fail_value(op, name, f"[..., S, K, d/S] with S * d/S = {dim}", shape_of(table))
    if not 1 <= codewords <= MAX_CODEWORDS or stages < 1:
        fail_value(op, name, f"of 1 to {MAX_CODEWORDS} codewords K", shape_of(table))
    return TableShape(stages, kv_heads, groups, codewords)


def _count_codes(
    op: str,
    name: str,
    codes: Tensor,
    batch: int,
    tokens: int | None,
    code_bits: int | None,
    table: TableShape,
) -> tuple[int, int]:
    """How many tokens there are, and how many codes each has.

    Own codes per KV head (C = R*Hkv*S) and one set for all heads (C = R*S) are told apart by their
    number; packed rows that fit both are read as the former. A packed row whose number of tokens
    is not known is full; codes of fewer than 8 bits a token leave it open, and are refused.
    """
    shared = table.stages * table.groups
    own = shared * table.kv_heads
    if code_bits is None:
        check_dtype(op, name, codes, CODES)
        check_ndim(op, name, codes, "B, N, C")
        if codes.shape[0] != batch or (tokens is not None and codes.shape[1] != tokens):
            expected = f"[{batch}, {'N' if tokens is None else tokens}, C]"
            fail_value(op, name, expected, shape_of(codes))
        if codes.shape[2] not in (own, shared):
            expected = f"[B, N, C] with C = R*Hkv*S = {own} or C = R*S = {shared}"
            fail_value(op, name, expected, shape_of(codes))
        return codes.shape[1], codes.shape[2]
    return _count_packed(op, name, codes, batch, tokens, code_bits, (own, shared))


def _count_packed(
    op: str,
    name: str,
    codes: Tensor,
    batch: int,
    tokens: int | None,
    code_bits: int,
    codes_per_token: tuple[int, ...],
) -> tuple[int, int]:
    """How many tokens packed rows hold, and which of ``codes_per_token`` fits them first."""
    check_dtype(op, name, codes, (torch.uint8,))
    if codes.ndim != 2 or codes.shape[0] != batch:
        fail_value(op, name, f"[{batch}, bytes] when code_bits is given", shape_of(codes))
    if not 1 <= code_bits <= MAX_CODE_BITS:
        fail_value(op, "code_bits", f"from 1 to {MAX_CODE_BITS}", code_bits)
    size = codes.shape[1]
    for per_token in codes_per_token:
        token_bits = per_token * code_bits
        if tokens is None and token_bits < 8 and size > 0:
            fail_value(op, "num_tokens", "given when a token takes fewer than 8 bits", None)
        count = size * 8 // token_bits if tokens is None else tokens
        if (count * token_bits + 7) // 8 == size:
            return count, per_token
    choices = " or ".join(str(count) for count in codes_per_token)
    expected = f"[{batch}, ceil(N*C*{code_bits}/8)] with C = {choices}"
    known = "" if tokens is None else f" and N = {tokens}"
    fail_value(op, name, expected + known, shape_of(codes))


def check_coded(op: str, query: Tensor, coded: CodedInput) -> CodedShape:
    """Everything about the coded side; query itself is checked already."""
    batch, dim = query.shape[0], query.shape[3]
    keys = _table_shape(op, "key_codebook", coded.key_codebook, dim)
    values = _table_shape(op, "value_codebook", coded.value_codebook, dim)
    if values.kv_heads != keys.kv_heads:
        expected = f"of Hkv = {keys.kv_heads} like key_codebook"
        fail_value(op, "value_codebook", expected, shape_of(coded.value_codebook))
    if coded.value_codes is None and values != keys:
        expected = "of key_codebook's R, S and K (or value_codes given)"
        fail_value(op, "value_codebook", expected, shape_of(coded.value_codebook))
    _check_heads(op, query, "key_codebook", keys.kv_heads)

    known = coded.num_tokens
    for tensor, axis in ((coded.code_mask, -1), (coded.cos, -2)):
        if known is None and tensor is not None and tensor.ndim >= 2:
            known = tensor.shape[axis]
    bits = coded.code_bits
    tokens, key_codes = _count_codes(op, "codes", coded.codes, batch, known, bits, keys)
    value_codes = key_codes
    if coded.value_codes is not None:
        _, value_codes = _count_codes(
            op, "value_codes", coded.value_codes, batch, tokens, bits, values
        )
    if coded.code_mask is not None:
        check_mask(op, "code_mask", coded.code_mask, batch, tokens)
    if coded.cos is not None and coded.sin is not None:
        _check_rope(op, coded.cos, coded.sin, batch, tokens, dim)
    for name, given in zip(coded._fields, coded, strict=True):
        if isinstance(given, Tensor):
            check_device(op, name, given, query.device)
    return CodedShape(tokens, key_codes, value_codes, keys.codewords, values.codewords)


def check_codewords(
    op: str, query: Tensor, counts: Tensor, key_codebook: Tensor, value_codebook: Tensor
) -> None:
    dim = query.shape[3]
    keys = _table_shape(op, "key_codebook", key_codebook, dim)
    if key_codebook.ndim != 4 or keys.groups != 1:
        fail_value(op, "key_codebook", "[Hkv, 1, K, d] (S = 1)", shape_of(key_codebook))
    if value_codebook.shape != key_codebook.shape:
        expected = f"of key_codebook's shape {list(key_codebook.shape)}"
        fail_value(op, "value_codebook", expected, shape_of(value_codebook))
    check_dtype(op, "value_codebook", value_codebook, FLOATING)
    _check_heads(op, query, "key_codebook", keys.kv_heads)
    check_dtype(op, "counts", counts, COUNTS)
    batch, codewords = query.shape[0], keys.codewords
    fits = counts.ndim == 3 and counts.shape[0] == batch and counts.shape[2] == codewords
    if not fits or counts.shape[1] not in (1, keys.kv_heads):
        expected = f"[{batch}, {keys.kv_heads} or 1, {codewords}] (B, Hkv or 1, K)"
        fail_value(op, "counts", expected, shape_of(counts))
    named = (("counts", counts), ("key_codebook", key_codebook), ("value_codebook", value_codebook))
    for name, tensor in named:
        check_device(op, name, tensor, query.device)


def check_count_codes(
    codes: Tensor,
    codewords: int,
    code_bits: int | None,
    num_tokens: int | None,
    codes_per_token: int | None,
    code_mask: Tensor | None,
) -> tuple[int, int]:
    """Everything about the call; gives N and C."""
    op, per_token = "count_codes", "codes_per_token"
    if not 1 <= codewords <= MAX_CODEWORDS:
        fail_value(op, "codewords", f"from 1 to {MAX_CODEWORDS}", codewords)
    for name, given, least in (("num_tokens", num_tokens, 0), (per_token, codes_per_token, 1)):
        if given is not None and given < least:
            fail_value(op, name, f"{least} or more", given)
    tokens = num_tokens
    if tokens is None and code_mask is not None and code_mask.ndim == 2:
        tokens = code_mask.shape[1]
    if code_bits is None:
        check_dtype(op, "codes", codes, CODES)
        check_ndim(op, "codes", codes, "B, N, C")
        batch, there, places = codes.shape
        if tokens not in (None, there) or codes_per_token not in (None, places):
            n, c = ("N" if tokens is None else tokens), (codes_per_token or "C")
            fail_value(op, "codes", f"[B, {n}, {c}]", shape_of(codes))
        tokens = there
    else:
        if codes_per_token is None:
            fail_value(op, per_token, "given when codes are packed (code_bits)", None)
        batch, known = codes.shape[0] if codes.ndim > 0 else 0, (codes_per_token,)
        tokens, places = _count_packed(op, "codes", codes, batch, tokens, code_bits, known)
    if code_mask is not None:
        check_mask(op, "code_mask", code_mask, batch, tokens)
        check_device(op, "code_mask", code_mask, codes.device)
    return tokens, places


def check_merge(op: str, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    check_dtype(op, "out_a", out_a, FLOATING)
    check_dtype(op, "out_b", out_b, (out_a.dtype,))
    if out_a.ndim < 1 or out_b.shape != out_a.shape:
        fail_value(op, "out_b", f"of out_a's shape {list(out_a.shape)}", shape_of(out_b))
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_dtype(op, name, lse, (torch.float32, torch.float64))
        if lse.shape != out_a.shape[:-1]:
            expected = f"of out_a's shape without d, {list(out_a.shape[:-1])}"
            fail_value(op, name, expected, shape_of(lse))
    check_dtype(op, "lse_b", lse_b, (lse_a.dtype,))
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        check_device(op, name, tensor, out_a.device)


def check_encode(op: str, vectors: Tensor, codebook: Tensor, half_norms: Tensor | None) -> None:
    _check_codebook(op, codebook)
    check_dtype(op, "vectors", vectors, FLOATING)
    groups, codewords, width = codebook.shape
    if vectors.ndim < 2 or vectors.shape[-2] != groups or vectors.shape[-1] != width:
        expected = f"[..., {groups}, {width}] (C and w of codebook)"
        fail_value(op, "vectors", expected, shape_of(vectors))
    check_device(op, "codebook", codebook, vectors.device)
    if half_norms is not None:
        check_dtype(op, "half_norms", half_norms, (torch.float32, torch.float64))
        if half_norms.shape != codebook.shape[:2]:
            expected = f"[{groups}, {codewords}] (C, K)"
            fail_value(op, "half_norms", expected, shape_of(half_norms))
        check_device(op, "half_norms", half_norms, vectors.device)


def check_encode_packed(
    vectors: Tensor, codebook: Tensor, code_bits: int, half_norms: Tensor | None
) -> int:
    """Everything about the call; gives the bytes of a batch row."""
    op = "encode_packed"
    check_ndim(op, "vectors", vectors, "B, N, C, w")
    check_encode(op, vectors, codebook, half_norms)
    if not 1 <= code_bits <= MAX_CODE_BITS:
        fail_value(op, "code_bits", f"from 1 to {MAX_CODE_BITS}", code_bits)
    if codebook.shape[1] > 2**code_bits:
        expected = f"of at most {2**code_bits} codewords K (code_bits = {code_bits})"
        fail_value(op, "codebook", expected, shape_of(codebook))
    return (vectors.shape[1] * vectors.shape[2] * code_bits + 7) // 8


def check_decode(codes: Tensor, codebook: Tensor) -> None:
    op = "decode"
    _check_codebook(op, codebook)
    check_dtype(op, "codes", codes, CODES)
    if codes.ndim < 1 or codes.shape[-1] != codebook.shape[0]:
        expected = f"[..., {codebook.shape[0]}] (C of codebook)"
        fail_value(op, "codes", expected, shape_of(codes))
    check_device(op, "codebook", codebook, codes.device)


def _check_codebook(op: str, codebook: Tensor) -> None:
    check_dtype(op, "codebook", codebook, FLOATING)
    check_ndim(op, "codebook", codebook, "C, K, w")
    if not 1 <= codebook.shape[1] <= MAX_CODEWORDS:
        expected = f"of 1 to {MAX_CODEWORDS} codewords K"
        fail_value(op, "codebook", expected, shape_of(codebook))


def check_code_values(
    op: str, name: str, codes: Tensor, codewords: int, code_mask: Tensor | None = None
) -> None:
    """Reads the codes (a device sync where they are not on the CPU); hidden tokens' are not."""
    if codes.numel() == 0:
        return
    low, high = torch.aminmax(codes)
    if int(low) >= 0 and int(high) < codewords:
        return
    wrong = (codes < 0) | (codes >= codewords)
    if code_mask is not None:
        wrong &= code_mask.unsqueeze(-1)
    for index in wrong.nonzero()[:1].tolist():
        value = int(codes[tuple(index)])
        fail_value(op, name, f"in [0, {codewords}) (K codewords)", f"{value} at index {index}")


def check_counts(op: str, counts: Tensor) -> None:
    """Reads the counts."""
    if counts.numel() == 0 or int(counts.min()) >= 0:
        return
    index = (counts < 0).nonzero()[0].tolist()
    fail_value(op, "counts", "0 or more", f"{int(counts[tuple(index)])} at index {index}")
