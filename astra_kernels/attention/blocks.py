"""Attention by blocks of scores in plain torch, on any device: what torch's flash kernel does not
have (softcap, mask gradients), forward and backward.

With lse at hand a block of weights is exp(scores - lse), so the backward keeps no scores:
ds = p (dp - delta), where delta = sum(dout * out) - dlse, p = exp(s - lse), dp = dout v^T.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from astra_kernels.attention.visibility import HIDDEN, Visibility

# Scores of a block, over all batch rows and heads: a few megabytes, which caches hold.
BLOCK = 2**19
MOST_KEYS = 1024

# From this log-sum-exp on, exp(scores - lse) is too coarse: rows are divided by their sums as well.
COARSE = 2.0**14


def compute_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def new_state(query: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Uninitialized out and lse; out [B, H, M, width or d] is stored as [B, M, H, …], the layout
    that the flash kernel writes and that models want next."""
    batch, heads, rows, dim = query.shape
    out = query.new_empty((batch, rows, heads, dim if width is None else width)).transpose(1, 2)
    return out, query.new_empty((batch, heads, rows), dtype=compute_dtype(query))


def zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros [B, H, M, d], stored as [B, M, H, d]."""
    batch, heads, rows, width = tensor.shape
    return tensor.new_zeros((batch, rows, heads, width), dtype=dtype).transpose(1, 2)


def blocks(batch_heads: int, see: Visibility) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Blocks of rows, each with the blocks of keys that its rows can see."""
    keys = min(MOST_KEYS, max(see.tokens, 1))
    rows = max(1, min(see.rows, BLOCK // (batch_heads * keys)))
    for start in range(0, see.rows, rows):
        stop = min(start + rows, see.rows)
        low, high = see.span(start, stop)
        yield start, stop, [(k, min(k + keys, high)) for k in range(low, high, keys)]


def some_heads(query: Tensor, key: Tensor, most: int) -> Iterator[tuple[slice, slice, slice]]:
    """Batch rows, heads and KV heads of a call: at most so many numbers of queries, or of keys, at
    a time, unless that left threads idle."""
    batch, heads, rows, dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    group = heads // kv_heads
    busy = -(-2 * torch.get_num_threads() // group)
    count = max(1, busy, most // max(1, max(group * rows, tokens) * dim))
    num_heads, num_rows = min(count, kv_heads), max(1, count // kv_heads)
    for row in range(0, batch, num_rows):
        for head in range(0, kv_heads, num_heads):
            last = min(head + num_heads, kv_heads)
            yield slice(row, row + num_rows), slice(head * group, last * group), slice(head, last)


def folded(tensor: Tensor, kv_heads: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start..stop of [B, H, M, d] as [B, Hkv, G * rows, d]: they share a KV head's keys."""
    part = tensor[:, :, start:stop].to(dtype)
    return part.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def scores_of(
    query: Tensor, key: Tensor, scale: float, softcap: float | None, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor | None]:
    """Folded queries and keys [B, Hkv, keys, d] -> scores [B, H, rows, keys], and the derivative
    of the cap."""
    scores = (query * scale) @ key.mT
    slope = None
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        slope = 1 - scores.square()
        scores = scores.mul_(softcap)
    shape = (scores.shape[0], heads, -1, key.shape[2])
    scores = scores.view(shape)
    if bias is not None:
        scores = scores.add_(bias).masked_fill_(bias == HIDDEN, HIDDEN)
    return scores, slope if slope is None else slope.view(shape)


def visible(key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of a block; those that no row of it sees are 0, as they may be NaN."""
    if bias is None:
        return key, value
    hidden = bias == HIDDEN
    if not hidden.any():
        return key, value
    hidden = hidden[(None,) * (4 - hidden.ndim)].all(dim=2)
    if hidden.shape[1] > 1:
        heads = key.shape[1]
        hidden = hidden.unflatten(1, (heads, -1)).all(dim=2)
    unseen = hidden.unsqueeze(-1)
    return key.masked_fill(unseen, 0.0), value.masked_fill(unseen, 0.0)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    see: Visibility,
) -> tuple[Tensor, Tensor]:
    """out [B, H, M, d_v], stored as [B, M, H, d_v], and lse, both in the dtype of accumulation."""
    batch, heads, rows, _ = query.shape
    kv_heads, dtype = key.shape[1], compute_dtype(query)
    out = query.new_zeros((batch, rows, heads, value.shape[3]), dtype=dtype).transpose(1, 2)
    lse = query.new_full((batch, heads, rows), HIDDEN, dtype=dtype)
    for start, stop, spans in blocks(batch * heads, see):
        q = folded(query, kv_heads, start, stop, dtype)
        for low, high in spans:
            bias = see.bias(start, stop, low, high, dtype, query.device)
            k, v = visible(key[:, :, low:high].to(dtype), value[:, :, low:high].to(dtype), bias)
            scores, _ = scores_of(q, k, scale, softcap, bias, heads)
            part_lse = scores.logsumexp(dim=3)
            top = part_lse.masked_fill(part_lse == HIDDEN, 0.0)
            # Divided by their own sum: lse is too coarse for that where scores are very large.
            weights = scores.sub_(top.unsqueeze(3)).exp_()
            total = weights.sum(dim=3, keepdim=True).clamp_(min=torch.finfo(dtype).tiny)
            part = (weights / total).view(batch, kv_heads, -1, high - low) @ v
            take_in(out[:, :, start:stop], lse[:, :, start:stop], part, part_lse)
    return out, lse


def take_in(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges the state of more keys into (out, lse), in place."""
    part = part.reshape(out.shape)
    lead = (part_lse - lse).masked_fill_((part_lse == HIDDEN) & (lse == HIDDEN), HIDDEN)
    out.lerp_(part, lead.sigmoid_().unsqueeze(3))
    lse.copy_(torch.logaddexp(lse, part_lse))


def merged(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) over the keys of all parts, at least one; the first one's tensors hold it."""
    rest = iter(parts)
    state = next(rest)
    for part in rest:
        take_in(*state, *part)
    return state


@dataclass(frozen=True)
class Softmax:
    """A softmax over any keys, seen from one source of them: what its gradient needs."""

    query: Tensor
    out: Tensor  # [B, H, M, d_v]
    lse: Tensor  # [B, H, M]
    grad_out: Tensor
    grad_lse: Tensor | None
    scale: float
    softcap: float | None
    # [B, H, M, 1], of exp(score - lse) over all keys, where lse is too coarse for them to be 1.
    sums: Tensor | None = None

    @functools.cached_property
    def delta(self) -> Tensor:
        """[B, H, M], what is subtracted from the gradient of every weight."""
        delta = torch.empty_like(self.lse)
        size = max(1, BLOCK * delta.shape[2] // max(1, self.out.numel()))
        for start in range(0, delta.shape[2], size):
            rows = slice(start, start + size)
            grad_out, out = (x[:, :, rows].to(delta.dtype) for x in (self.grad_out, self.out))
            torch.sum(grad_out * out, dim=3, out=delta[:, :, rows])
        return delta if self.grad_lse is None else delta.sub_(self.grad_lse)

    def part(self, batch: slice, heads: slice) -> Softmax:
        """That of some batch rows and some heads; views."""
        place = (batch, heads)
        return replace(
            self,
            query=self.query[place],
            out=self.out[place],
            lse=self.lse[place],
            grad_out=self.grad_out[place],
            grad_lse=None if self.grad_lse is None else self.grad_lse[place],
            sums=None if self.sums is None else self.sums[place],
        )


def is_coarse(lse: Tensor) -> bool:
    """Whether a row's lse is so large that exp(scores - lse) are no weights."""
    return bool((lse.masked_fill(lse == HIDDEN, 0.0).abs() > COARSE).any())


def backward(
    softmax: Softmax, key: Tensor, value: Tensor, see: Visibility, grad_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query [B, H, M, d], key and value, in the dtype of accumulation, of what these
    keys add to the softmax. ``grad_mask``, of attn_mask's four axes, is added to."""
    query, dtype = softmax.query, compute_dtype(softmax.query)
    kv_heads = key.shape[1]
    batch, heads, _, _ = query.shape
    grad_query, grad_key, grad_value = (zeros_like(x, dtype) for x in (query, key, value))
    # A row that sees nothing has weights exp(-inf - inf) = 0.
    lse = softmax.lse.masked_fill(softmax.lse == HIDDEN, float("inf")).unsqueeze(3)
    delta = softmax.delta.unsqueeze(3)
    for start, stop, spans in blocks(batch * heads, see):
        q = folded(query, kv_heads, start, stop, dtype)
        grad_out = folded(softmax.grad_out, kv_heads, start, stop, dtype)
        grad_q = torch.zeros_like(q)
        for low, high in spans:
            keys = slice(low, high)
            bias = see.bias(start, stop, low, high, dtype, query.device)
            k, v = visible(key[:, :, keys].to(dtype), value[:, :, keys].to(dtype), bias)
            scores, slope = scores_of(q, k, softmax.scale, softmax.softcap, bias, heads)
            weights = scores.sub_(lse[:, :, start:stop]).exp_()
            if softmax.sums is not None:
                weights = weights.div_(softmax.sums[:, :, start:stop])
            shape = (batch, kv_heads, -1, high - low)
            grad_value[:, :, keys] += weights.view(shape).mT @ grad_out
            grad = (grad_out @ v.mT).view_as(weights).sub_(delta[:, :, start:stop]).mul_(weights)
            if bias is not None:
                grad = grad.masked_fill_(bias == HIDDEN, 0.0)
            if grad_mask is not None:
                _add_to_mask(grad_mask, grad, start, stop, low, high)
            if slope is not None:
                grad = grad.mul_(slope)
            grad = grad.view(shape)
            grad_q += grad @ k
            grad_key[:, :, keys] += grad.mT @ q
        grad_q = grad_q.unflatten(2, (-1, stop - start)).flatten(1, 2)
        grad_query[:, :, start:stop] = grad_q
    return grad_query.mul_(softmax.scale), grad_key.mul_(softmax.scale), grad_value


def sums_of(softmax: Softmax, key: Tensor, see: Visibility) -> Tensor:
    """The sums of exp(scores - lse) over these keys, [B, H, M, 1]."""
    query, dtype = softmax.query, compute_dtype(softmax.query)
    heads, kv_heads = query.shape[1], key.shape[1]
    lse = softmax.lse.masked_fill(softmax.lse == HIDDEN, float("inf")).unsqueeze(3)
    sums = torch.zeros_like(lse)
    for start, stop, spans in blocks(query.shape[0] * heads, see):
        q = folded(query, kv_heads, start, stop, dtype)
        for low, high in spans:
            bias = see.bias(start, stop, low, high, dtype, query.device)
            k = key[:, :, low:high].to(dtype)
            k, _ = visible(k, k, bias)
            scores, _ = scores_of(q, k, softmax.scale, softmax.softcap, bias, heads)
            weights = scores.sub_(lse[:, :, start:stop]).exp_()
            sums[:, :, start:stop] += weights.sum(dim=3, keepdim=True)
    return sums


def _add_to_mask(
    grad_mask: Tensor, grad: Tensor, start: int, stop: int, low: int, high: int
) -> None:
    rows = slice(start, stop) if grad_mask.shape[2] > 1 else slice(None)
    keys = slice(low, high) if grad_mask.shape[3] > 1 else slice(None)
    part = grad_mask[:, :, rows, keys]
    part += grad.sum_to_size(part.shape)
