"""torch's scaled_dot_product_attention, name for name, by the op ``attention``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa
from torch.overrides import has_torch_function

from astra_kernels._checks import FLOATING
from astra_kernels.attention import attention

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with the same arguments and numbers (to
    rounding; where torch's versions or devices differ, as torch 2.13 on a CPU).

    By torch's own function runs what this package's op is not made for: dropout (``dropout_p`` >
    0), nested and sparse tensors, subclasses with functions of their own, ``vmap``, forward-mode
    derivatives, other dtypes than Args names, grouped keys and values of unlike numbers of heads
    or axes, a mask together with is_causal, no heads, d = 0, d_v = 0; and whatever is wrong, so
    errors are torch's. Second derivatives are refused.

    Args:
        query: [..., H, M, d], fp32, fp64, fp16 or bf16; two axes or more.
        key, value: [..., H, L, d] and [..., H, L, d_v] of query's dtype. Leading axes broadcast.
        attn_mask: broadcasts to [..., H, M, L]; bool: True = visible; of query's dtype (or fp32
            where query is fp16 or bf16): added to the scores. A query that sees nothing gives 0.
        dropout_p: of the weights, also outside of training.
        is_causal: query m sees keys 0..m, also where M and L differ (top-left aligned, unlike
            ``attention``).
        scale: of the scores; None: 1/sqrt(d).
        enable_gqa: whether key and value may have Hkv heads, of which H is a multiple.

    Returns:
        [..., H, M, d_v] of query's dtype; contiguous where query is.

    Raises:
        RuntimeError, ValueError, TypeError: torch's own.
        RuntimeError: a second derivative.

    Example:
        >>> query, key, value = torch.randn(3, 1, 8, 5, 64).unbind()
        >>> out = ak.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> want = torch.nn.functional.scaled_dot_product_attention(
        ...     query, key, value, is_causal=True
        ... )
        >>> torch.allclose(out, want, atol=1e-5)
        True
    """
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    call = None
    if dropout_p == 0.0 and _is_ours(query, key, value, attn_mask, is_causal):
        call = _arranged(query, key, value, attn_mask, enable_gqa)
    if call is None:
        return torch_sdpa(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    # torch stores out as query is: what callers view as other shapes stays so.
    contiguous = query.is_contiguous()
    query, key, value, mask, lead = call
    rows, tokens = query.shape[2], key.shape[2]
    window = None
    if is_causal and rows < tokens:
        # Top-left: keys behind the last query are seen by none.
        key, value = key[:, :, :rows], value[:, :, :rows]
    elif is_causal and rows > tokens:
        # Query m stands at key tokens - rows + m and sees up to key m.
        is_causal, window = False, (-1, rows - tokens)
    out, _ = attention(
        query,
        key,
        value,
        is_causal=is_causal,
        attn_mask=mask,
        window=window,
        scale=None if scale is None else float(scale),
    )
    if contiguous:
        out = out.contiguous()
    return out if lead is None else out.reshape(*lead, *out.shape[2:])


def _autocast(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs in the dtype that ``torch.autocast`` has torch's function compute in, if any."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    plain = all(isinstance(tensor, Tensor) for tensor in tensors)
    if not plain or has_torch_function(tensors) or query.device.type not in ("cpu", "cuda"):
        return query, key, value, attn_mask
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value, attn_mask
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Any) -> Any:
        fits = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if fits and x.device.type == kind else x

    return cast(query), cast(key), cast(value), cast(attn_mask)


class _Call(NamedTuple):
    """The inputs with four axes, and what leading axes out has (None: these)."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    lead: tuple[int, ...] | None


def _is_ours(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> bool:
    """Whether types, dtypes and devices are those of the op; shapes are looked at later."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or has_torch_function(tensors):
        return False
    if query.dtype not in FLOATING or not query.dtype == key.dtype == value.dtype:
        return False
    if any(x.is_nested or x.layout is not torch.strided or x.ndim < 2 for x in tensors[:3]):
        return False
    if any(x.device != query.device for x in tensors):
        return False
    if attn_mask is not None:
        half = query.dtype in (torch.float16, torch.bfloat16)
        wider = half and attn_mask.dtype == torch.float32
        if is_causal or (attn_mask.dtype not in (torch.bool, query.dtype) and not wider):
            return False
    return torch.compiler.is_compiling() or not _is_transformed(tensors)


def _is_transformed(tensors: tuple[Tensor, ...]) -> bool:
    """By vmap, or in forward mode."""
    functorch = torch._C._functorch
    forward_mode = forward_ad._current_level >= 0
    if not forward_mode and functorch.peek_interpreter_stack() is None:
        return False
    for tensor in tensors:
        layer = tensor
        while True:
            if forward_mode and forward_ad.unpack_dual(layer).tangent is not None:
                return True
            if not functorch.is_functorch_wrapped_tensor(layer):
                break
            if functorch.is_batchedtensor(layer):
                return True
            layer = functorch.get_unwrapped(layer)
    return False


def _arranged(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> _Call | None:
    """The inputs as [B, H, M, d], without copies but for five axes and more; None: not ours."""
    dim, tokens = query.shape[-1], key.shape[-2]
    if dim == 0 or key.shape[-1] != dim or value.shape[-2] != tokens or value.shape[-1] == 0:
        return None
    ndim = max(query.ndim, key.ndim, value.ndim)
    plain = query.ndim == key.ndim == value.ndim == 4
    if plain and query.shape[0] == key.shape[0] and key.shape[:2] == value.shape[:2]:
        heads, kv_heads = query.shape[1], key.shape[1]
        lead = None
    else:
        arranged = _broadcast(query, key, value, ndim, enable_gqa)
        if arranged is None:
            return None
        query, key, value, lead = arranged
        heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads < 1 or heads % kv_heads != 0 or (kv_heads not in (1, heads) and not enable_gqa):
        return None
    if attn_mask is None:
        return _Call(query, key, value, None, lead)
    mask = _mask(attn_mask, query, tokens, lead)
    return None if mask is None else _Call(query, key, value, mask, lead)


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, ndim: int, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]] | None:
    """Leading axes broadcast, and made two: batch rows, and heads that keys may repeat."""
    grouped = enable_gqa and ndim > 2
    if enable_gqa and not query.ndim == key.ndim == value.ndim:
        return None
    leads = [(1,) * (ndim - x.ndim) + tuple(x.shape[:-2]) for x in (query, key, value)]
    if grouped and leads[1][-1] != leads[2][-1]:
        return None
    # Heads that are grouped do not broadcast against the query's.
    outer = [lead[:-1] if grouped else lead for lead in leads]
    try:
        shape = tuple(torch.broadcast_shapes(*outer))
    except RuntimeError:
        return None
    tensors = []
    for x, lead in zip((query, key, value), leads, strict=True):
        full = (*shape, lead[-1]) if grouped else shape
        x = x.expand(*full, *x.shape[-2:])
        # Three axes without groups are batch rows of one head, and out is as torch stores it.
        if ndim == 3 and not grouped:
            x = x.unsqueeze(1)
        elif ndim == 2:
            x = x[None, None]
        elif ndim == 3:
            x = x.unsqueeze(0)
        elif ndim > 4:
            x = x.flatten(0, -4)
        tensors.append(x)
    out_lead = (*shape, leads[0][-1]) if grouped else shape
    return tensors[0], tensors[1], tensors[2], out_lead


def _mask(mask: Tensor, query: Tensor, tokens: int, lead: tuple[int, ...] | None) -> Tensor | None:
    """The mask over [B, H, M, L]; None: it does not broadcast to them."""
    lead = tuple(query.shape[:2]) if lead is None else lead
    full = (*lead, query.shape[2], tokens)
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    if not 1 <= mask.ndim <= len(full) or any(a != 1 and a != b for a, b in sizes):
        return None
    if len(full) == 3 and mask.ndim == 3 and query.shape[1] == 1:
        return mask.unsqueeze(1)
    if len(full) > 4 and mask.ndim > 3:
        mask = mask.expand(*lead[:-1], *mask.shape[-3:])
        return mask.flatten(0, -4)
    return mask
