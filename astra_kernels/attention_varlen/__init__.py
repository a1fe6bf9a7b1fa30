"""Dense attention over sequences of any lengths, laid end to end."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels._autograd import undifferentiated
from astra_kernels._checks import check_scale, check_softcap, check_tensors, check_window

__all__ = ["attention_varlen"]


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attention` of each of B sequences by itself, without padding (ragged, or jagged).

    Sequence b has queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] and keys cu_seqlens_k[b] to
    cu_seqlens_k[b + 1]; ``is_causal`` and ``window`` hold inside a sequence, bottom-right aligned.

    Args:
        query: [T, H, d], fp32, fp64, fp16 or bf16: the tokens of all sequences.
        key, value: [U, Hkv, d] and [U, Hkv, d_v] of query's dtype; H is a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: int32 (or int64) [B + 1], from 0 to T and to U, never falling.
            They are read on the host: on a CPU, or with a sync, wherever the rest is. Under a
            CUDA graph they have to be on the CPU.
        is_causal, window, scale, softcap, sinks, impl: as of `attention`.

    Returns:
        out: [T, H, d_v] of query's dtype.
        lse: [T, H], natural log, fp32 (fp64 for fp64 queries).
        A query that sees no key has out 0 and lse -inf, with sinks lse = the head's sink.
        Gradients go to query, key, value and sinks, through out and lse.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes, devices or offsets that do not fit.
        RuntimeError: ``impl`` cannot run here or lacks an argument.

    Example:
        >>> query, key, value = torch.randn(3, 12, 8, 64).unbind()  # 7 and 5 tokens
        >>> offsets = torch.tensor([0, 7, 12], dtype=torch.int32)
        >>> out, lse = ak.attention_varlen(query, key, value, offsets, offsets, is_causal=True)
        >>> out.shape, lse.shape
        (torch.Size([12, 8, 64]), torch.Size([12, 8]))
    """
    op = "attention_varlen"
    optional = None if sinks is None else {"sinks": sinks}
    check_tensors(
        op,
        optional,
        query=query,
        key=key,
        value=value,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        differentiable=True,
    )
    check_scale(op, scale)
    check_softcap(op, softcap)
    check_window(op, window)
    with undifferentiated(query, key, value, sinks):
        out, lse = torch.ops.astra.attention_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            is_causal,
            window,
            scale,
            softcap,
            sinks,
            impl,
        )
    return out, lse
