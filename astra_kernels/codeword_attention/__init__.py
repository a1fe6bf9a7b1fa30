"""Attention over codewords weighted by how often they occur: constant in the number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._autograd import undifferentiated
from astra_kernels._checks import check_scale, check_tensors

__all__ = ["codeword_attention"]


def codeword_attention(
    query: Tensor,
    counts: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k_c^T + ln counts_c) v_c over the codewords c, and its log-sum-exp.

    Tokens with equal codes have equal keys (no rotary positions, one code a token and head), and n
    equal keys add n*exp(score) = exp(score + ln n) to the softmax. So this equals
    ``coded_attention`` over any tokens that have these counts, exactly, out and lse.

    Args:
        query: [B, H, M, d], fp32, fp64, fp16 or bf16; H is a multiple of Hkv.
        counts: integers [B, Hkv, K], or [B, 1, K] when all heads share one code; 0 = not there.
        key_codebook, value_codebook: [Hkv, 1, K, d] and [Hkv, 1, K, d_v], any floating dtype, K
            up to 65,536.
        scale: of the scores; None: 1/sqrt(d).
        impl: "auto", "reference" or "triton"; an explicit choice never falls back.
        check: whether to read the counts and refuse negative ones; None: on the CPU only.

    Returns:
        out: [B, H, M, d_v] of query's dtype, stored as [B, M, H, d_v].
        lse: [B, H, M], natural log, fp32 (fp64 for fp64 queries).
        Where all counts are 0, out is 0 and lse -inf. Codewords of count 0 never matter. The same
        input gives the same bits on the same number of threads.
        Gradients go to query and the tables, through out and lse.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit, a negative count.
        RuntimeError: ``impl`` cannot run here.

    Example:
        >>> keys, values = torch.randn(2, 2, 1, 1024, 64)
        >>> codes = torch.randint(0, 1024, (1, 300, 2), dtype=torch.int32)
        >>> query, counts = torch.randn(1, 8, 5, 64), ak.count_codes(codes, 1024)
        >>> out, _ = ak.codeword_attention(query, counts, keys, values)
        >>> want, _ = ak.coded_attention(query, codes, keys, values)
        >>> torch.allclose(out, want, atol=1e-5)
        True
    """
    op = "codeword_attention"
    args = (query, counts, key_codebook, value_codebook, scale, impl, check)
    state: tuple[Tensor, Tensor] | None = replay.run(op, args)
    if state is not None:
        return state
    tables: dict[str, Any] = {"key_codebook": key_codebook, "value_codebook": value_codebook}
    check_tensors(op, differentiable=True, query=query, counts=counts, **tables)
    check_scale(op, scale)
    with undifferentiated(query, key_codebook, value_codebook):
        out, lse = torch.ops.astra.codeword_attention(*args)
    return out, lse
