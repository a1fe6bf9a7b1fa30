"""The gradient of attention over codes, to the query, the tables and a float mask.

Codes are looked up a block at a time and never all at once; a block's gradients to its keys and
values are added to the rows of the tables that they came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from astra_kernels._rotary import Rope, apply_rope
from astra_kernels.attention import blocks
from astra_kernels.attention.blocks import Softmax, compute_dtype, zeros_like
from astra_kernels.attention.gradient import (
    Gradients,
    new_grad_mask,
    of_keys,
    of_sinks,
    softmax_of,
    with_sums,
)
from astra_kernels.attention.visibility import Visibility, visibility
from astra_kernels.coded_attention.cpu import collapses
from astra_kernels.codeword_attention import gradient as codeword_gradient
from astra_kernels.count_codes.cpu import count

# Numbers of looked-up keys in a block, over all batch rows and KV heads.
LOOKED_UP = 2**20


@dataclass(frozen=True)
class Tokens:
    """Tokens known by codes [B, N, C], in tables [R, Hkv, S, K, d/S]."""

    codes: Tensor
    keys: Tensor
    values: Tensor
    value_codes: Tensor
    rope: Rope | None
    code_mask: Tensor | None

    def blocks(self) -> Iterator[tuple[int, int]]:
        batch, tokens, _ = self.codes.shape
        heads, groups, _, width = self.keys.shape[1:]
        size = max(256, LOOKED_UP // max(1, batch * heads * groups * width))
        for start in range(0, tokens, size):
            yield start, min(start + size, tokens)

    def rotation(self, start: int, stop: int) -> Rope | None:
        if self.rope is None:
            return None
        cos, sin = (x[..., start:stop, :] for x in self.rope)
        return cos, sin


def describe(
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    value_codes: Tensor | None,
    rope: Rope | None,
    code_mask: Tensor | None,
) -> Tokens:
    keys = key_codebook if key_codebook.ndim == 5 else key_codebook.unsqueeze(0)
    values = value_codebook if value_codebook.ndim == 5 else value_codebook.unsqueeze(0)
    value_codes = codes if value_codes is None else value_codes
    return Tokens(codes, keys, values, value_codes, rope, code_mask)


def rows_of(codes: Tensor, table: Tensor, code_mask: Tensor | None) -> Tensor:
    """Which rows of table [R, Hkv, S, K, w] codes [B, n, C] mean, int64 [R, B, n, Hkv, S]."""
    stages, kv_heads, groups, codewords, _ = table.shape
    batch, tokens, codes_per_token = codes.shape
    index = codes.long()
    if code_mask is not None:
        # Codes of hidden tokens may be anything.
        index = index.masked_fill(~code_mask.unsqueeze(2), 0)
    if not codes.is_cpu:
        # They were not read: no row outside of a table is.
        index = index.clamp(0, codewords - 1)
    shared = codes_per_token == stages * groups
    index = index.reshape(batch, tokens, stages, 1 if shared else kv_heads, groups)
    first = torch.arange(0, kv_heads * groups * codewords, codewords, device=codes.device)
    return (index + first.view(kv_heads, groups)).movedim(2, 0)


def look_up(index: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows, summed over stages, as [B, Hkv, n, d], stored as [B, n, Hkv, d]."""
    vectors: Tensor | None = None
    for rows, place in zip(table.flatten(1, 3), index, strict=True):
        stage = rows.index_select(0, place.reshape(-1)).to(dtype)
        vectors = stage if vectors is None else vectors.add_(stage)
    assert vectors is not None
    width = table.shape[2] * table.shape[4]
    return vectors.view(*index.shape[1:4], width).transpose(1, 2)


def add_rows(grad_table: Tensor, index: Tensor, grad: Tensor) -> None:
    """Adds grad [B, Hkv, n, d] to the rows of grad_table [R, Hkv, S, K, w] that index names."""
    width = grad_table.shape[4]
    source = grad.transpose(1, 2).reshape(-1, width)
    for rows, place in zip(grad_table.flatten(1, 3), index, strict=True):
        flat = place.reshape(-1)
        if source.is_cpu:
            # Ten times as fast as index_add_, whose rows are added one by one.
            rows += torch.ops.aten.embedding_dense_backward(source, flat, len(rows), -1, False)
        else:
            rows.index_add_(0, flat, source)


def apply_rope_backward(grad: Tensor, rope: Rope) -> Tensor:
    """The transpose of ``apply_rope``: where the halves of angles are equal, a rotation back."""
    cos, sin = (table.to(grad.dtype).unsqueeze(-3) for table in rope)
    half = grad.shape[-1] // 2
    back = grad * cos
    back[..., :half].addcmul_(grad[..., half:], sin[..., half:])
    back[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
    return back


def of_tokens(
    softmax: Softmax, tokens: Tokens, see: Visibility, grad_mask: Tensor | None, fast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to the query and to both tables, in the dtype of accumulation."""
    dtype = compute_dtype(softmax.query)
    grad_query = zeros_like(softmax.query, dtype)
    grad_keys, grad_values = (
        torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        for x in (tokens.keys, tokens.values)
    )
    for start, stop in tokens.blocks():
        part = slice(start, stop)
        mask = None if tokens.code_mask is None else tokens.code_mask[:, part]
        key_rows = rows_of(tokens.codes[:, part], tokens.keys, mask)
        value_rows = key_rows
        if tokens.value_codes is not tokens.codes:
            value_rows = rows_of(tokens.value_codes[:, part], tokens.values, mask)
        key, value = _looked_up(tokens, key_rows, value_rows, start, stop, dtype)
        mask_part = grad_mask
        if mask_part is not None and mask_part.shape[3] > 1:
            mask_part = mask_part[..., part]
        grads = of_keys(softmax, key, value, see.of_keys(start, stop), mask_part, fast)
        grad_query += grads[0]
        rotation = tokens.rotation(start, stop)
        grad_key = grads[1] if rotation is None else _unrotated(grads[1], rotation, mask)
        add_rows(grad_keys, key_rows, grad_key)
        add_rows(grad_values, value_rows, grads[2])
    return grad_query, grad_keys, grad_values


def _unrotated(grad: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
    back = apply_rope_backward(grad, rope)
    # Positions of hidden tokens may be NaN.
    return back if mask is None else back.masked_fill_(~mask[:, None, :, None], 0.0)


def _looked_up(
    tokens: Tokens,
    key_rows: Tensor,
    value_rows: Tensor,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    key = look_up(key_rows, tokens.keys, dtype)
    rotation = tokens.rotation(start, stop)
    if rotation is not None:
        key = apply_rope(key, rotation)
    value = look_up(value_rows, tokens.values, dtype)
    if tokens.code_mask is not None:
        hidden = ~tokens.code_mask[:, None, start:stop, None]
        key, value = key.masked_fill_(hidden, 0.0), value.masked_fill_(hidden, 0.0)
    return key, value


def sums_of(softmax: Softmax, tokens: Tokens, see: Visibility) -> Tensor:
    """The sums of exp(scores - lse) over all tokens, [B, H, M, 1]."""
    dtype = compute_dtype(softmax.query)
    sums = softmax.lse.new_zeros((*softmax.lse.shape, 1))
    for start, stop in tokens.blocks():
        part = slice(start, stop)
        mask = None if tokens.code_mask is None else tokens.code_mask[:, part]
        rows = rows_of(tokens.codes[:, part], tokens.keys, mask)
        key = look_up(rows, tokens.keys, dtype)
        rotation = tokens.rotation(start, stop)
        key = key if rotation is None else apply_rope(key, rotation)
        if mask is not None:
            key = key.masked_fill(~mask[:, None, :, None], 0.0)
        sums += blocks.sums_of(softmax, key, see.of_keys(start, stop))
    return sums


def coded_attention(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    value_codes: Tensor | None = None,
    scale: float | None = None,
    rope: Rope | None = None,
    code_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    wanted: frozenset[str],
    fast: bool = True,
) -> Gradients:
    """Gradients by the arguments' names; those of ``wanted``, and maybe more."""
    softmax = softmax_of(query, out, lse, grad_out, grad_lse, scale, softcap)
    tokens = describe(codes, key_codebook, value_codebook, value_codes, rope, code_mask)
    grad_mask = new_grad_mask(attn_mask, "attn_mask" in wanted, lse.dtype)
    see = visibility(query, codes.shape[1], False, code_mask, attn_mask)
    if query.numel() > 0 and attn_mask is not None and blocks.is_coarse(lse):
        softmax = with_sums(softmax, [sums_of(softmax, tokens, see)], sinks)
    result = dict(
        zip(
            ("query", "key_codebook", "value_codebook"),
            of_codes(softmax, tokens, see, grad_mask, value_codes is None, fast),
            strict=True,
        )
    )
    if grad_mask is not None:
        result["attn_mask"] = grad_mask
    if "sinks" in wanted and sinks is not None:
        result["sinks"] = of_sinks(softmax, sinks)
    return result


def of_codes(
    softmax: Softmax,
    tokens: Tokens,
    see: Visibility,
    grad_mask: Tensor | None,
    same_codes: bool,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``of_tokens``, or of the codewords where counting codes takes less."""
    other_codes = None if same_codes else tokens.value_codes
    sizes = (tokens.codes.shape[1], tokens.codes.shape[2])
    counted = collapses(softmax.query, sizes, tokens.keys, tokens.rope, other_codes)
    if see.attn_mask is not None or not counted or not tokens.codes.is_cpu:
        return of_tokens(softmax, tokens, see, grad_mask, fast)
    counts = count(tokens.codes, tokens.keys.shape[3], tokens.code_mask)
    grads = codeword_gradient.of_codewords(softmax, counts, tokens.keys[0], tokens.values[0], fast)
    return grads[0], grads[1].unsqueeze(0), grads[2].unsqueeze(0)
