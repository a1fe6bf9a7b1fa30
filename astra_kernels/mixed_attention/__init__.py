"""Mixed-Precision Attention: local tokens dense, remote tokens as codes, one softmax."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._autograd import undifferentiated
from astra_kernels._checks import (
    check_scale,
    check_softcap,
    check_tensors,
    check_window,
    split_rope,
)

__all__ = ["mixed_attention"]

Rope = tuple[Tensor, Tensor]


@overload
def mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    is_causal: bool = ...,
    key_mask: Tensor | None = ...,
    attn_mask: Tensor | None = ...,
    window: tuple[int, int] | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    value_codes: Tensor | None = ...,
    code_bits: int | None = ...,
    num_tokens: int | None = ...,
    rope: Rope | None = ...,
    code_mask: Tensor | None = ...,
    code_attn_mask: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
    check: bool | None = ...,
) -> Tensor: ...
@overload
def mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    is_causal: bool = ...,
    key_mask: Tensor | None = ...,
    attn_mask: Tensor | None = ...,
    window: tuple[int, int] | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    value_codes: Tensor | None = ...,
    code_bits: int | None = ...,
    num_tokens: int | None = ...,
    rope: Rope | None = ...,
    code_mask: Tensor | None = ...,
    code_attn_mask: Tensor | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
    check: bool | None = ...,
) -> tuple[Tensor, Tensor]: ...
def mixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    value_codes: Tensor | None = None,
    code_bits: int | None = None,
    num_tokens: int | None = None,
    rope: Rope | None = None,
    code_mask: Tensor | None = None,
    code_attn_mask: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    check: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over L dense and N coded tokens in one softmax (arXiv 2505.19342, section 3):
    softmax(scale * q [k; k(codes)]^T) [v; v(codes)].

    Equals ``merge_state(*attention(...), *coded_attention(...))``; a drop-in for
    ``scaled_dot_product_attention`` where some of the tokens are known by their codes only.

    Args:
        query: [B, H, M, d], fp32, fp64, fp16 or bf16.
        key, value: [B, Hkv, L, d] and [B, Hkv, L, d_v] of query's dtype; see ``attention``.
        codes, key_codebook, value_codebook, value_codes, code_bits, num_tokens, rope, code_mask,
            check: the coded tokens; see ``coded_attention``. ``rope``
            turns the looked-up keys only; query and key come rotated already.
        is_causal: among the dense tokens query m sees keys 0..L-M+m (bottom-right aligned);
            coded tokens are all visible.
        key_mask: bool [B, L], True = visible.
        attn_mask, window: of the dense tokens; see ``attention``.
        code_attn_mask: as attn_mask, of the coded tokens; broadcasts to [B, H, M, N].
        scale: of the scores; None: 1/sqrt(d).
        softcap, sinks: of the one softmax over both; see ``attention``.
        return_lse: whether to return (out, lse) instead of out.
        impl: "auto", "reference", "triton" or "native"; an explicit choice never falls back.

    Returns:
        out: [B, H, M, d_v] of query's dtype, stored as [B, M, H, d_v].
        lse, if asked for: [B, H, M], natural log, fp32 (fp64 for fp64 queries).
        A query that sees nothing has out 0 and lse -inf, with sinks lse = the head's sink.
        Accumulation is fp32 (fp64). The same input gives the same bits on the same number of
        threads.
        Gradients go to query, key, value, the tables, masks and sinks, through out and lse. On a
        GPU those of tables are summed by atomics, in any order, but under
        ``use_deterministic_algorithms``.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit, a visible code out of range.
        RuntimeError: ``impl`` cannot run.

    Example:
        >>> query, key, value = torch.randn(1, 8, 5, 64), *torch.randn(2, 1, 2, 5, 64)
        >>> tables = torch.randn(2, 2, 1, 1024, 64)  # of keys and of values, 2 KV heads
        >>> codes = torch.randint(0, 1024, (1, 300, 2), dtype=torch.int32)
        >>> ak.mixed_attention(query, key, value, codes, *tables, is_causal=True).shape
        torch.Size([1, 8, 5, 64])
    """
    op = "mixed_attention"
    cos, sin = split_rope(op, rope)
    args = (
        *(query, key, value, is_causal, key_mask, attn_mask, window),
        *(codes, key_codebook, value_codebook, value_codes, code_bits, num_tokens, cos, sin),
        *(code_mask, code_attn_mask, scale, softcap, sinks, impl, check),
    )
    state: tuple[Tensor, Tensor] | None = replay.run(op, args)
    if state is not None:
        return state if return_lse else state[0]
    optional = {"key_mask": key_mask, "value_codes": value_codes, "code_mask": code_mask}
    optional |= {"cos": cos, "sin": sin}
    if attn_mask is not None or code_attn_mask is not None or sinks is not None:
        optional |= {"attn_mask": attn_mask, "code_attn_mask": code_attn_mask, "sinks": sinks}
    tensors: dict[str, Any] = {"query": query, "key": key, "value": value, "codes": codes}
    tables: dict[str, Any] = {"key_codebook": key_codebook, "value_codebook": value_codebook}
    check_tensors(op, optional, differentiable=True, **tensors, **tables)
    check_scale(op, scale)
    check_softcap(op, softcap)
    check_window(op, window)
    masks = (attn_mask, code_attn_mask, sinks)
    with undifferentiated(query, key, value, *tables.values(), *masks, cos, sin):
        out, lse = torch.ops.astra.mixed_attention(*args)
    return (out, lse) if return_lse else out
