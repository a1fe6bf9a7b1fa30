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
from astra_kernels.attention.blocks import Softmax, compute_dtype, zeros_like
from astra_kernels.attention.visibility import HIDDEN, Visibility, visibility

Gradients = dict[str, Tensor]

# Rows of queries that share one flash call under a window: it computes whole blocks.
BAND_ROWS = 128

# Channels that are added where lse has a gradient: one is needed, eight keep rows aligned.
LSE_CHANNELS = 8

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value of what these keys add, in the dtype of accumulation;
    that of the mask is added to ``grad_mask``. ``fast``: more than blocks may be used."""
    if softmax.query.numel() == 0 or key.shape[2] == 0:
        dtype = compute_dtype(softmax.query)
        return tuple(zeros_like(x, dtype) for x in (softmax.query, key, value))  # type: ignore[return-value]
    if fast and grad_mask is None and _triton_serves(softmax, key, value):
        return _by_triton(softmax, key, value, see)
    served = softmax.softcap is None and softmax.sums is None
    if not fast or not served or grad_mask is not None or not softmax.query.is_cpu:
        return blocks.backward(softmax, key, value, see, grad_mask)
    grads = _by_flash(softmax, key, value, see)
    if see.attn_mask is not None and not all(grad.sum().isfinite() for grad in grads):
        # Keys that a mask hides from all rows may be NaN, which the kernel multiplies by 0.
        return blocks.backward(softmax, key, value, see, grad_mask)
    return grads


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
    from astra_kernels._triton.attention import Dense
    from astra_kernels._triton.gradient import attention_gradient

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
    query, key, value, out, grad_out = (
        _ready(x, width, dtype) for x in (softmax.query, key, value, softmax.out, softmax.grad_out)
    )
    if softmax.grad_lse is not None:
        # The kernel subtracts sum(grad_out * out) only: one more channel makes that delta.
        out[..., -1] = -softmax.grad_lse
        grad_out[..., -1] = 1.0
    lse = softmax.lse
    if not lse.isfinite().all():
        # A row that sees nothing has weights exp(-inf - inf) = 0.
        lse = lse.masked_fill(lse == HIDDEN, float("inf"))
    softmax = replace(softmax, query=query, out=out, grad_out=grad_out, lse=lse)
    grads = _pieces(softmax, key, value, see)
    return tuple(  # type: ignore[return-value]
        x if x.shape[3] == wide else x[..., :wide] for x, wide in zip(grads, widths, strict=True)
    )


def _ready(tensor: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """As the kernel takes it: of one width and dtype, channels one after the other."""
    tensor = tensor.to(dtype)
    if tensor.shape[3] != width:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[3]))
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _call(
    softmax: Softmax,
    key: Tensor,
    value: Tensor,
    rows: slice = slice(None),
    is_causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    query, out, grad_out = (x[:, :, rows] for x in (softmax.query, softmax.out, softmax.grad_out))
    return _flash(
        *(grad_out, query, key, value, out, softmax.lse[:, :, rows], 0.0, is_causal),
        attn_mask=bias,
        scale=softmax.scale,
    )


def _pieces(
    softmax: Softmax, key: Tensor, value: Tensor, see: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls of the kernel that make up the whole, and leave out what is not seen."""
    if see.open or (see.causal and see.rows == see.tokens):
        return _call(softmax, key, value, is_causal=not see.open)
    grads = (
        zeros_like(softmax.query, key.dtype),
        zeros_like(key, key.dtype),
        zeros_like(value, key.dtype),
    )
    if see.causal:
        # The keys before the square that all rows see, then the square; rows above it see nothing.
        square = min(see.rows, see.tokens)
        first = see.tokens - square
        rows = slice(see.rows - square, see.rows)
        if first > 0:
            part = _call(softmax, key[:, :, :first], value[:, :, :first], rows)
            _add(grads, part, rows, slice(0, first))
        part = _call(softmax, key[:, :, first:], value[:, :, first:], rows, is_causal=True)
        _add(grads, part, rows, slice(first, see.tokens))
        return grads
    block = min(BAND_ROWS, see.rows) if see.banded else _rows_at_once(see)
    for start in range(0, see.rows, block):
        rows = slice(start, min(start + block, see.rows))
        low, high = see.span(rows.start, rows.stop)
        if low == high:
            continue
        bias = see.bias(rows.start, rows.stop, low, high, key.dtype, key.device)
        if bias is not None:
            bias = bias.expand(*bias.shape[:-2], rows.stop - start, high - low)
        part = _call(softmax, key[:, :, low:high], value[:, :, low:high], rows, bias=bias)
        _add(grads, part, rows, slice(low, high))
    return grads


def _rows_at_once(see: Visibility) -> int:
    """All, unless a mask has to be converted."""
    mask = see.attn_mask
    if mask is None or mask.shape[2] == 1 or mask.dtype in (torch.float32, torch.float64):
        return see.rows
    return max(1, min(see.rows, blocks.BLOCK * 8 * see.rows // max(1, mask.numel())))


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
    grads = of_keys(softmax, key, value, see, grad_mask, fast)
    result = dict(zip(("query", "key", "value"), grads, strict=True))
    if grad_mask is not None:
        result["attn_mask"] = grad_mask
    if "sinks" in wanted and sinks is not None:
        result["sinks"] = of_sinks(softmax, sinks)
    return result
