"""Dense attention over local tokens, with its log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels._checks import check_scale, check_tensors

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q k^T) v, and lse = ln sum exp(scale * q k^T).

    Args:
        query: [B, H, M, d], fp32, fp64, fp16 or bf16.
        key, value: [B, Hkv, L, d] of query's dtype; H is a multiple of Hkv, and query heads
            [i*H/Hkv, (i+1)*H/Hkv) read KV head i.
        is_causal: query m sees keys 0..L-M+m (bottom-right aligned); needs M <= L.
        key_mask: bool [B, L], True = visible. What hidden keys and values hold never matters.
        scale: of the scores; None: 1/sqrt(d).
        impl: "auto", "reference", "triton" or "native"; an explicit choice never falls back.

    Returns:
        out: [B, H, M, d] of query's dtype, stored as [B, M, H, d].
        lse: [B, H, M], natural log, fp32 (fp64 for fp64 queries).
        A query that sees no key has out 0 and lse -inf. Accumulation is fp32 (fp64). The same
        input gives the same bits on the same number of threads.

    Raises:
        TypeError: a dtype that is not listed. ValueError: shapes or devices that do not fit.
        RuntimeError: an input requires grad, or ``impl`` cannot run here.

    Example:
        >>> query, key, value = torch.randn(3, 1, 8, 5, 64).unbind()
        >>> out, lse = ak.attention(query, key, value, is_causal=True)
        >>> out.shape, lse.shape
        (torch.Size([1, 8, 5, 64]), torch.Size([1, 8, 5]))
    """
    check_tensors("attention", {"key_mask": key_mask}, query=query, key=key, value=value)
    check_scale("attention", scale)
    out, lse = torch.ops.astra.attention(query, key, value, is_causal, key_mask, scale, impl)
    return out, lse
