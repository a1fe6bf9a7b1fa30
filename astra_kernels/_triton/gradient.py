"""The gradient of dense attention: two kernels, neither of which keeps scores or adds atomically.

With the log-sum-exp at hand a tile of weights is p = exp(s - lse) again. Of ds = p (dp - delta),
with dp = dout v^T and delta = sum(dout * out) - dlse, come

    dv = p^T dout      dk = scale ds^T q      (``gradient_of_keys``: a program owns a tile of keys)
    dq = scale ds k                           (``gradient_of_queries``: it owns a tile of rows)

A softcap c multiplies ds by 1 - (s/c)^2. The query heads of a KV head are rows of one tile, row =
m * G + g, so what they add to dk and dv is summed in the loop, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from astra_kernels._triton.arguments import mask_arguments, padded, rows_contiguous, window
from astra_kernels._triton.blocks import LOG2_E, capped, load_rows
from astra_kernels._triton.launch import capability, cdiv, launch
from astra_kernels._triton.sources import Dense
from astra_kernels._triton.tiles import Tile

# Not the strides: what divides them says how wide rows may be read.
_SIZES = ["num_queries", "num_keys", "left", "right", "seen_b", "seen_h"]


@triton.jit
def weights_of(
    scores, lse, mask_places, row_mask, token_mask, position, token, before, left, right, softcap,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of scores scale q.k, and the slope of the cap; all arguments broadcast to scores."""
    slope = 1.0
    if softcap is not None:
        scores = capped(scores, softcap, PRECISION)
        slope = 1.0 - (scores / softcap) * (scores / softcap)
    seen = row_mask & token_mask
    if CAUSAL:
        seen = seen & (token < position + before)
    if left is not None:
        place = position + before - 1
        if right is not None:
            place -= right
        seen = seen & (token >= place - left)
    if mask_places is not None:
        if mask_places.dtype.element_ty == tl.uint8:
            seen = seen & (tl.load(mask_places, mask=seen, other=0) != 0)
        else:
            bias = tl.load(mask_places, mask=seen, other=-float("inf")).to(tl.float32)
            seen = seen & (bias != -float("inf"))
            scores += bias
    # A row that sees nothing has no weights: its lse of -inf would make them NaN.
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    weights = tl.exp2((scores - lse) * LOG2_E)
    return tl.where(seen, weights, 0.0), slope


@triton.jit
def visible_tokens(token, num_keys, key_mask, seen):
    """Which tokens are read: those of the sequence that some query may see."""
    token_mask = token < num_keys
    if key_mask is not None:
        token_mask = token_mask & (tl.load(key_mask + token, mask=token_mask, other=0) != 0)
    if seen is not None:
        token_mask = token_mask & (tl.load(seen + token, mask=token_mask, other=0) != 0)
    return token_mask


@triton.jit(do_not_specialize=_SIZES)
def gradient_of_keys(
    query, query_b, query_h, query_m, grad, grad_b, grad_h, grad_m,  # [B, H, M, d], [B, H, M, d_v]
    key, key_b, key_h, key_l, value, value_b, value_h, value_l,  # [B, Hkv, L, d or d_v]
    lse, delta, grad_key, grad_value,  # fp32 [B, H, M]; [B, L, Hkv, d or d_v]
    key_mask, attn_mask, mask_b, mask_h, mask_m, mask_l, seen, seen_b, seen_h,
    num_queries_per_kv, num_kv_heads, num_queries, num_keys, left, right, scale, softcap,
    CAUSAL: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    VALUE_HEAD: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = query.dtype.element_ty
    batch = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = tl.program_id(1) % num_kv_heads
    first_token = tl.program_id(0) * KEYS
    token = first_token + tl.arange(0, KEYS)
    if key_mask is not None:
        key_mask += batch * num_keys
    if seen is not None:
        seen += batch * seen_b + head * seen_h
    token_mask = visible_tokens(token, num_keys, key_mask, seen)
    key += batch * key_b + head * key_h
    keys = load_rows(key + token.to(tl.int64) * key_l, token_mask, HEAD, BLOCK)
    value += batch * value_b + head * value_h
    values = load_rows(
        value + token.to(tl.int64) * value_l, token_mask, VALUE_HEAD, VALUE_BLOCK
    )  # fmt: skip
    sum_keys = tl.zeros([KEYS, BLOCK], tl.float32)
    sum_values = tl.zeros([KEYS, VALUE_BLOCK], tl.float32)
    before = num_keys - num_queries + 1
    if right is not None:
        before += right
    # Rows from the first to behind the last one that see any of these keys.
    first_row = 0
    last_row = num_queries * num_queries_per_kv
    if CAUSAL:
        first = tl.maximum(first_token - before + 1, 0) * num_queries_per_kv
        first_row = tl.minimum(first, last_row) // ROWS * ROWS
    if left is not None:
        start = num_keys - num_queries - left
        last = tl.maximum(first_token + KEYS - start, 0)
        last_row = tl.minimum(last_row, tl.minimum(last, num_queries) * num_queries_per_kv)
    for start_row in range(first_row, last_row, ROWS):
        row = start_row + tl.arange(0, ROWS)
        row_mask = row < num_queries * num_queries_per_kv
        position = row // num_queries_per_kv
        query_head = head * num_queries_per_kv + row % num_queries_per_kv
        offset = batch * query_b + query_head * query_h + position.to(tl.int64) * query_m
        queries = load_rows(query + offset, row_mask, HEAD, BLOCK)
        offset = batch * grad_b + query_head * grad_h + position.to(tl.int64) * grad_m
        grads = load_rows(grad + offset, row_mask, VALUE_HEAD, VALUE_BLOCK)
        offset = (batch * (num_kv_heads * num_queries_per_kv) + query_head) * num_queries + position
        lse_rows = tl.load(lse + offset, mask=row_mask, other=-float("inf"))[None, :]
        delta_rows = tl.load(delta + offset, mask=row_mask, other=0.0)[None, :]
        places = None
        if attn_mask is not None:
            offset = batch * mask_b + query_head * mask_h + position.to(tl.int64) * mask_m
            places = (attn_mask + offset)[None, :] + (token * mask_l)[:, None]
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        weights, slope = weights_of(
            scores, lse_rows, places, row_mask[None, :], token_mask[:, None], position[None, :],
            token[:, None], before, left, right, softcap, CAUSAL, PRECISION,
        )  # fmt: skip
        sum_values = tl.dot(weights.to(DTYPE), grads, sum_values, input_precision=PRECISION)
        slopes = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        grad_scores = weights * (slopes - delta_rows) * slope
        sum_keys = tl.dot(grad_scores.to(DTYPE), queries, sum_keys, input_precision=PRECISION)
    there = token < num_keys
    offset = (batch * num_keys + token) * num_kv_heads + head
    channel = tl.arange(0, BLOCK)
    mask = there[:, None] & (channel < HEAD)[None, :]
    tl.store(grad_key + offset[:, None] * HEAD + channel[None, :], sum_keys * scale, mask=mask)
    channel = tl.arange(0, VALUE_BLOCK)
    mask = there[:, None] & (channel < VALUE_HEAD)[None, :]
    tl.store(grad_value + offset[:, None] * VALUE_HEAD + channel[None, :], sum_values, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def gradient_of_queries(
    query, query_b, query_h, query_m, grad, grad_b, grad_h, grad_m,  # [B, H, M, d], [B, H, M, d_v]
    key, key_b, key_h, key_l, value, value_b, value_h, value_l,  # [B, Hkv, L, d or d_v]
    lse, delta, grad_query,  # fp32 [B, H, M]; [B, M, H, d]
    key_mask, attn_mask, mask_b, mask_h, mask_m, mask_l, seen, seen_b, seen_h,
    num_queries_per_kv, num_kv_heads, num_queries, num_keys, left, right, scale, softcap,
    CAUSAL: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
    VALUE_HEAD: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = query.dtype.element_ty
    batch = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = tl.program_id(1) % num_kv_heads
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    row_mask = row < num_queries * num_queries_per_kv
    position = row // num_queries_per_kv
    query_head = head * num_queries_per_kv + row % num_queries_per_kv
    offset = batch * query_b + query_head * query_h + position.to(tl.int64) * query_m
    queries = load_rows(query + offset, row_mask, HEAD, BLOCK)
    offset = batch * grad_b + query_head * grad_h + position.to(tl.int64) * grad_m
    grads = load_rows(grad + offset, row_mask, VALUE_HEAD, VALUE_BLOCK)
    heads = num_kv_heads * num_queries_per_kv
    offset = (batch * heads + query_head) * num_queries + position
    lse_rows = tl.load(lse + offset, mask=row_mask, other=-float("inf"))[:, None]
    delta_rows = tl.load(delta + offset, mask=row_mask, other=0.0)[:, None]
    if key_mask is not None:
        key_mask += batch * num_keys
    if seen is not None:
        seen += batch * seen_b + head * seen_h
    if attn_mask is not None:
        attn_mask += batch * mask_b + query_head * mask_h + position.to(tl.int64) * mask_m
    key += batch * key_b + head * key_h
    value += batch * value_b + head * value_h
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    before = num_keys - num_queries + 1
    if right is not None:
        before += right
    first, last = 0, num_keys
    if CAUSAL:
        last = tl.minimum(last, (first_row + ROWS - 1) // num_queries_per_kv + before)
    if left is not None:
        reached = first_row // num_queries_per_kv + num_keys - num_queries - left
        first = tl.maximum(reached, 0) // KEYS * KEYS
    for start in range(first, last, KEYS):
        token = start + tl.arange(0, KEYS)
        token_mask = visible_tokens(token, num_keys, key_mask, seen)
        keys = load_rows(key + token.to(tl.int64) * key_l, token_mask, HEAD, BLOCK)
        values = load_rows(
            value + token.to(tl.int64) * value_l, token_mask, VALUE_HEAD, VALUE_BLOCK
        )  # fmt: skip
        places = None
        if attn_mask is not None:
            places = attn_mask[:, None] + (token * mask_l)[None, :]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        weights, slope = weights_of(
            scores, lse_rows, places, row_mask[:, None], token_mask[None, :], position[:, None],
            token[None, :], before, left, right, softcap, CAUSAL, PRECISION,
        )  # fmt: skip
        slopes = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        grad_scores = weights * (slopes - delta_rows) * slope
        total = tl.dot(grad_scores.to(DTYPE), keys, total, input_precision=PRECISION)
    channel = tl.arange(0, BLOCK)
    mask = row_mask[:, None] & (channel < HEAD)[None, :]
    offset = (batch * num_queries + position) * heads + query_head
    tl.store(grad_query + offset[:, None] * HEAD + channel[None, :], total * scale, mask=mask)


def attention_gradient(
    query: Tensor, dense: Dense, lse: Tensor, grad_out: Tensor, delta: Tensor,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to query, key and value, fp32, stored as [B, M, H, d] and [B, L, Hkv, d or d_v].

    grad_out: [B, H, M, d_v]; delta: fp32 [B, H, M], sum(grad_out * out) - grad_lse. Deterministic.
    Not for rows whose scores are so large that lse is too coarse for their weights.
    """
    batch, heads, num_queries, dim = query.shape
    kv_heads, num_keys, width = dense.key.shape[1], dense.key.shape[2], dense.value.shape[3]
    stored = [(batch, num_queries, heads, dim)]
    stored += [(batch, num_keys, kv_heads, size) for size in (dim, width)]
    grads = [query.new_zeros(shape, dtype=torch.float32) for shape in stored]
    if query.numel() > 0 and num_keys > 0:
        _launch(query, dense, lse, grad_out, delta, scale, softcap, grads)
    grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)
    return grad_query, grad_key, grad_value


def _launch(
    query: Tensor, dense: Dense, lse: Tensor, grad_out: Tensor, delta: Tensor,
    scale: float, softcap: float | None, grads: list[Tensor],
) -> None:  # fmt: skip
    batch, heads, num_queries, dim = query.shape
    kv_heads, num_keys, width = dense.key.shape[1], dense.key.shape[2], dense.value.shape[3]
    group = heads // kv_heads
    left, right = window(dense)
    read = [query, grad_out.to(query.dtype), dense.key, dense.value]
    given = [x for tensor in map(rows_contiguous, read) for x in (tensor, *tensor.stride()[:3])]
    given += [lse.contiguous(), delta.contiguous()]
    rest = [
        None if dense.mask is None else dense.mask.contiguous(),
        *mask_arguments(query, dense.attn_mask, num_keys, kv_heads),
        *(group, kv_heads, num_queries, num_keys, left, right or None, scale, softcap),
    ]
    of_keys, of_queries = _tiles(
        query, max(padded(dim), padded(width)), dense.attn_mask is not None
    )
    constants = {
        "CAUSAL": right is not None, "HEAD": dim, "BLOCK": padded(dim), "VALUE_HEAD": width,
        "VALUE_BLOCK": padded(width),
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
    }  # fmt: skip
    pairs = batch * kv_heads
    for kernel, programs, tile, out in (
        (gradient_of_keys, cdiv(num_keys, of_keys.columns), of_keys, grads[1:]),
        (gradient_of_queries, cdiv(num_queries * group, of_queries.rows), of_queries, grads[:1]),
    ):
        launch(
            kernel, (programs, pairs), *given, *out, *rest, device=query.device, warps=tile.warps,
            stages=tile.stages, all_registers=True, ROWS=tile.rows, KEYS=tile.columns, **constants,
        )  # fmt: skip


def _tiles(query: Tensor, channels: int, masked: bool) -> tuple[Tile, Tile]:
    """Rows and keys of a program of either kernel: of keys, of queries. None spills but the second
    of fp32 with a mask per query beyond 64 channels: no tile of at most eight warps holds it."""
    if query.element_size() == 4:
        if channels > 64:
            return Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)
        return Tile(32, 32, 8, 1), Tile(16, 32, 8, 1) if masked else Tile(32, 32, 8, 1)
    if channels > 128:
        return Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)
    if channels > 64 or masked or capability(query.device) < 90:
        return Tile(32, 64, 8, 2), Tile(64, 32, 8, 2)
    return Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)
