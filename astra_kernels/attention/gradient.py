"""The gradient of dense attention: torch's flash backward on a CPU where it serves, the Triton
kernels on a GPU, else by blocks.

Keys of one softmax may come from several sources (dense, coded): with the log-sum-exp of all of
them at hand each source's gradient stands alone, and those to the query are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from astra_kernels.attention import blocks
from astra_kernels.attention.blocks import Softmax, compute_dtype, some_heads, zeros_like
from astra_kernels.attention.visibility import HIDDEN, Visibility, of_heads, visibility

Gradients = dict[str, Tensor]

# Rows of queries that share one flash call under a window: it computes whole blocks.
BAND_ROWS = 128

# Channels that are added where lse has a gradient: one is needed, eight keep rows aligned.
LSE_CHANNELS = 8

# Numbers of queries or of keys that are brought into another dtype or width at a time, unless that
# left threads idle.
CONVERTED = 2**18

# The same of the keys of one head, where threads would be idle.
MOST_CONVERTED = 2**20

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def softmax_of(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> Softmax:
    if grad_out is None:
        grad_out = out.new_zeros(()).expand(out.shape)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return Softmax(query, out, lse, grad_out, grad_lse, scale, softcap)


def of_keys(
    softmax: Softmax,
    key: Tensor,
    value: Tensor,
    see: Visibility,
    grad_mask: Tensor | None,
    fast: bool,
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value of what these keys add; that of the mask is added to
    ``grad_mask``. ``fast``: more than blocks may be used. ``dtypes``: those that the gradients to
    the query, and to key and value, may be in already; None: that of accumulation."""
    accumulated = compute_dtype(softmax.query)
    to_query, to_keys = (accumulated, accumulated) if dtypes is None else dtypes
    tensors = ((softmax.query, to_query), (key, to_keys), (value, to_keys))
    if softmax.query.numel() == 0 or key.shape[2] == 0:
        return tuple(zeros_like(x, dtype) for x, dtype in tensors)  # type: ignore[return-value]
    if fast and grad_mask is None and _triton_serves(softmax, key, value):
        return _by_triton(softmax, key, value, see)
    if not softmax.query.is_cpu:
        return blocks.backward(softmax, key, value, see, grad_mask)
    flash = fast and grad_mask is None and softmax.softcap is None and softmax.sums is None
    converts = softmax.query.dtype != accumulated or (flash and not _is_ready(softmax, value, see))
    if not converts:
        return _on_cpu(softmax, key, value, see, grad_mask, flash)
    grads = tuple(zeros_like(x, dtype) for x, dtype in tensors)
    for batch, heads, kv_heads in some_heads(softmax.query, key, CONVERTED):
        place, own = (batch, heads), (batch, kv_heads)
        mask = None if grad_mask is None else of_heads(grad_mask, batch, heads)
        part = (softmax.part(batch, heads), key[own], value[own], see.of_heads(batch, heads), mask)
        grads[0][place] = _by_keys(*part, flash, grads[1][own], grads[2][own])
    return grads  # type: ignore[return-value]


def _by_keys(
    softmax: Softmax,
    key: Tensor,
    value: Tensor,
    see: Visibility,
    grad_mask: Tensor | None,
    flash: bool,
    grad_key: Tensor,
    grad_value: Tensor,
) -> Tensor:
    """Some keys at a time: the gradient to the query; those to key and value are written."""
    batch, heads, tokens, width = key.shape
    size = max(256, MOST_CONVERTED // (batch * heads * width))
    grad_query: Tensor | None = None
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        keys = slice(start, stop)
        mask = grad_mask
        if mask is not None and mask.shape[3] > 1:
            mask = mask[..., keys]
        some = see if size >= tokens else see.of_keys(start, stop)
        part = _on_cpu(softmax, key[:, :, keys], value[:, :, keys], some, mask, flash)
        grad_key[:, :, keys], grad_value[:, :, keys] = part[1:]
        grad_query = part[0] if grad_query is None else grad_query.add_(part[0])
        # The next keys' take their place.
        del part
    assert grad_query is not None
    return grad_query


def _is_ready(softmax: Softmax, value: Tensor, see: Visibility) -> bool:
    """Whether torch's flash kernel takes the tensors of a call as they are."""
    one_width = softmax.query.shape[3] == value.shape[3]
    return one_width and softmax.grad_lse is None and see.key_mask is None


def _on_cpu(
    softmax: Softmax,
    key: Tensor,
    value: Tensor,
    see: Visibility,
    grad_mask: Tensor | None,
    flash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if flash:
        grads = _by_flash(softmax, key, value, see)
        # Keys that a mask hides from all rows may be NaN, which the kernel multiplies by 0.
        if see.attn_mask is None or all(grad.sum().isfinite() for grad in grads):
            return grads
    return blocks.backward(softmax, key, value, see, grad_mask)


def _triton_serves(softmax: Softmax, key: Tensor, value: Tensor) -> bool:
    from astra_kernels._dispatch import runs_triton  # which imports this module

    dtype = softmax.query.dtype
    if softmax.sums is not None or dtype == torch.float64 or key.dtype != value.dtype:
        return False
    return key.dtype == dtype and runs_triton(softmax.query.device)


def _by_triton(
    softmax: Softmax, key: Tensor, value: Tensor, see: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    # Triton is optional: imported on first use.
    from astra_kernels._triton.gradient import attention_gradient
    from astra_kernels._triton.sources import Dense

    left, right = (-1 if limit is None else limit for limit in (see.left, see.right))
    dense = Dense(key, value, False, see.key_mask, see.attn_mask, (left, right))
    return attention_gradient(
        *(softmax.query, dense, softmax.lse, softmax.grad_out, softmax.delta),
        *(softmax.scale, softmax.softcap),
    )


def _by_flash(
    softmax: Softmax, key: Tensor, value: Tensor, see: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(softmax.query)
    widths = (softmax.query.shape[3], key.shape[3], value.shape[3])
    width = max(widths) + (0 if softmax.grad_lse is None else LSE_CHANNELS)
    if see.key_mask is not None:
        hidden = ~see.key_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    key, value = (_in_rows(_ready(x, width, dtype)) for x in (key, value))
    lse = softmax.lse
    if not lse.isfinite().all():
        # A row that sees nothing has weights exp(-inf - inf) = 0.
        lse = lse.masked_fill(lse == HIDDEN, float("inf"))
    grads = _pieces(replace(softmax, lse=lse), key, value, see)
    return tuple(  # type: ignore[return-value]
        x if x.shape[3] == wide else x[..., :wide] for x, wide in zip(grads, widths, strict=True)
    )


def _ready(tensor: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Of one width and dtype, as the kernel takes it."""
    tensor, more = tensor.to(dtype), width - tensor.shape[3]
    return torch.nn.functional.pad(tensor, (0, more)) if more else tensor


def _in_rows(tensor: Tensor) -> Tensor:
    """Channels one after the other."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _call(
    softmax: Softmax,
    key: Tensor,
    value: Tensor,
    rows: slice = slice(None),
    is_causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    width, dtype = key.shape[3], key.dtype
    tensors = (softmax.query, softmax.out, softmax.grad_out)
    query, out, grad_out = (_ready(x[:, :, rows], width, dtype) for x in tensors)
    if softmax.grad_lse is not None:
        # The kernel subtracts sum(grad_out * out) only: one more channel makes that delta.
        out[..., -1] = -softmax.grad_lse[:, :, rows]
        grad_out[..., -1] = 1.0
    # The kernel copies grad_out by itself, unless it is stored as it wants it.
    return _flash(
        *(grad_out, _in_rows(query), key, value, _in_rows(out), softmax.lse[:, :, rows]),
        *(0.0, is_causal),
        attn_mask=bias,
        scale=softmax.scale,
    )


def _pieces(
    softmax: Softmax, key: Tensor, value: Tensor, see: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls of the kernel that make up the whole, and leave out what is not seen."""
    block = _rows_at_once(softmax, key, see)
    square = see.causal and see.rows == see.tokens
    if block >= see.rows and (see.open or square):
        return _call(softmax, key, value, is_causal=square)
    batch, heads, num_rows, _ = softmax.query.shape
    grad_query = key.new_zeros((batch, num_rows, heads, key.shape[3])).transpose(1, 2)
    grads = (grad_query, zeros_like(key, key.dtype), zeros_like(value, key.dtype))
    for start in range(0, see.rows, block):
        for rows, keys, is_causal in _seen(see, start, min(start + block, see.rows)):
            bias = None
            if not see.causal:
                places = (rows.start, rows.stop, keys.start, keys.stop)
                bias = see.bias(*places, key.dtype, key.device)
            if bias is not None:
                size = (rows.stop - rows.start, keys.stop - keys.start)
                bias = bias.expand(*bias.shape[:-2], *size)
            part = _call(softmax, key[:, :, keys], value[:, :, keys], rows, is_causal, bias)
            _add(grads, part, rows, keys)
            del part
    return grads


def _seen(see: Visibility, start: int, stop: int) -> list[tuple[slice, slice, bool]]:
    """What rows start..stop see as rectangles of rows and keys; of a square the half below its
    diagonal, where the last is True."""
    if not see.causal:
        low, high = see.span(start, stop)
        return [(slice(start, stop), slice(low, high), False)] if low < high else []
    place = see.place
    # Rows above see nothing.
    start = max(start, -place)
    if start >= stop:
        return []
    rows, first = slice(start, stop), place + start
    square = (rows, slice(first, place + stop), True)
    return [(rows, slice(0, first), False), square] if first > 0 else [square]


def _rows_at_once(softmax: Softmax, key: Tensor, see: Visibility) -> int:
    """All, unless a band leaves out keys, or a mask or the queries have to be converted."""
    mask, block = see.attn_mask, see.rows
    if see.banded and not see.causal:
        block = min(BAND_ROWS, block)
    if mask is not None and mask.shape[2] > 1 and mask.dtype.itemsize < 4:
        block = max(1, min(block, blocks.BLOCK * 8 * see.rows // max(1, mask.numel())))
    query, width = softmax.query, key.shape[3]
    if query.dtype != key.dtype or query.shape[3] != width or softmax.out.shape[3] != width:
        per_row = query.shape[0] * query.shape[1] * width
        block = min(block, max(BAND_ROWS, CONVERTED // per_row))
    return block


def _add(
    grads: tuple[Tensor, ...], part: tuple[Tensor, Tensor, Tensor], rows: slice, keys: slice
) -> None:
    for grad, more, where in zip(grads, part, (rows, keys, keys), strict=True):
        grad[:, :, where] += more


def of_sinks(softmax: Softmax, sinks: Tensor) -> Tensor:
    """A sink is a key whose value is zero: ds = p (0 - delta)."""
    lse = softmax.lse.masked_fill(softmax.lse == HIDDEN, float("inf"))
    weights = (sinks.to(lse.dtype)[:, None] - lse).exp_()
    if softmax.sums is not None:
        weights /= softmax.sums.squeeze(3)
    return -(weights * softmax.delta).sum(dim=(0, 2))


def with_sums(softmax: Softmax, sums: Sequence[Tensor], sinks: Tensor | None) -> Softmax:
    """The softmax with the sums of all its sources, for rows whose lse is coarse."""
    total = torch.stack(tuple(sums)).sum(dim=0)
    if sinks is not None:
        lse = softmax.lse.masked_fill(softmax.lse == HIDDEN, float("inf"))
        total = total + (sinks.to(lse.dtype)[:, None] - lse).exp_().unsqueeze(3)
    return replace(softmax, sums=total.clamp_(min=1.0))


def new_grad_mask(mask: Tensor | None, wanted: bool, dtype: torch.dtype) -> Tensor | None:
    """Zeros of a mask's shape, with four axes."""
    if mask is None or not wanted:
        return None
    return mask.new_zeros((1,) * (4 - mask.ndim) + mask.shape, dtype=dtype)


def attention(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window: Sequence[int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    wanted: frozenset[str],
    fast: bool = True,
) -> Gradients:
    """Gradients by the arguments' names; those of ``wanted``, and maybe more."""
    see = visibility(query, key.shape[2], is_causal, key_mask, attn_mask, window)
    softmax = softmax_of(query, out, lse, grad_out, grad_lse, scale, softcap)
    grad_mask = new_grad_mask(attn_mask, "attn_mask" in wanted, lse.dtype)
    if query.numel() > 0 and attn_mask is not None and blocks.is_coarse(lse):
        softmax = with_sums(softmax, [blocks.sums_of(softmax, key, see)], sinks)
    grads = of_keys(softmax, key, value, see, grad_mask, fast, (query.dtype, query.dtype))
    result = dict(zip(("query", "key", "value"), grads, strict=True))
    if grad_mask is not None:
        result["attn_mask"] = grad_mask
    if "sinks" in wanted and sinks is not None:
        result["sinks"] = of_sinks(softmax, sinks)
    return result
