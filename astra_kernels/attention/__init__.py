"""Dense attention over local tokens, with its log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._autograd import undifferentiated
from astra_kernels._checks import check_scale, check_softcap, check_tensors, check_window
from astra_kernels.attention import native

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """out = softmax(s) v and lse = ln sum exp(s), with scores s = cap(scale * q k^T) + attn_mask.

    Args:
        query: [B, H, M, d], fp32, fp64, fp16 or bf16.
        key: [B, Hkv, L, d] of query's dtype; H is a multiple of Hkv, and query heads
            [i*H/Hkv, (i+1)*H/Hkv) read KV head i.
        value: [B, Hkv, L, d_v] of query's dtype; d_v may differ from d.
        is_causal: query m sees keys 0..L-M+m: the last query stands at the last key (bottom-right
            aligned). With M > L the first M - L queries see nothing.
        key_mask: bool [B, L], True = visible. What hidden keys and values hold never matters.
        attn_mask: broadcasts to [B, H, M, L]. bool: True = visible. Of query's dtype (fp32 too
            where that is fp16 or bf16): added to the scores after scale and softcap; -inf hides,
            finfo.min does not. What is hidden from all queries never matters, as with key_mask.
        window: (left, right): query m, which stands at key p = L-M+m, sees keys p-left..p+right;
            -1 is no limit. All that hides a key (masks, is_causal, window) adds up.
        scale: of the scores; None: 1/sqrt(d).
        softcap: a positive number c; scores become c * tanh(scores / c). None: no cap.
        sinks: fp32 (fp64 too for fp64 queries) [H]; a score for each head that takes part in the
            softmax with the value 0. Of states that are merged only one may have sinks.
        impl: "auto", "reference", "triton" or "native"; an explicit choice never falls back.

    Returns:
        out: [B, H, M, d_v] of query's dtype, stored as [B, M, H, d_v].
        lse: [B, H, M], natural log, fp32 (fp64 for fp64 queries).
        A query that sees no key has out 0 and lse -inf, with sinks lse = the head's sink.
        Accumulation is fp32 (fp64). The same input gives the same bits on the same number of
        threads.
        Gradients go to query, key, value, a float attn_mask and sinks, through out and lse.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit.
        RuntimeError: ``impl`` cannot run here or lacks an argument; second derivatives and forward
            mode, which only the differentiable ``attention.reference`` has.

    Example:
        >>> query, key, value = torch.randn(3, 1, 8, 5, 64).unbind()
        >>> out, lse = ak.attention(query, key, value, is_causal=True)
        >>> out.shape, lse.shape
        (torch.Size([1, 8, 5, 64]), torch.Size([1, 8, 5]))

        ALiBi is a float mask, a sliding window of 4 keys and the query's own a window:

        >>> slopes = 2.0 ** -torch.arange(1, 9)
        >>> distance = (torch.arange(5)[:, None] - torch.arange(5)).abs()
        >>> alibi = -slopes[:, None, None] * distance  # [H, M, L]
        >>> out, _ = ak.attention(query, key, value, attn_mask=alibi, window=(4, 0))
    """
    masked = key_mask is not None or attn_mask is not None or window is not None
    if not masked and softcap is None and sinks is None:
        state = native.plain_attention(query, key, value, is_causal, scale, impl)
        if state is not None:
            return state
    op = "attention"
    args = (query, key, value, is_causal, key_mask, attn_mask, window, scale, softcap, sinks, impl)
    state = replay.run(op, args)
    if state is not None:
        return state
    optional = None
    if key_mask is not None or attn_mask is not None or sinks is not None:
        optional = {"key_mask": key_mask, "attn_mask": attn_mask, "sinks": sinks}
    check_tensors(op, optional, query=query, key=key, value=value, differentiable=True)
    check_scale(op, scale)
    check_softcap(op, softcap)
    check_window(op, window)
    with undifferentiated(query, key, value, attn_mask, sinks):
        out, lse = torch.ops.astra.attention(*args)
    return out, lse
