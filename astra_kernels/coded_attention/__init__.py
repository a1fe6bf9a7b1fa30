"""Attention over remote tokens, straight from their vector-quantization codes."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._autograd import undifferentiated
from astra_kernels._checks import check_scale, check_softcap, check_tensors, split_rope
from astra_kernels.coded_attention import native

__all__ = ["coded_attention"]


def coded_attention(
    query: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    value_codes: Tensor | None = None,
    code_bits: int | None = None,
    num_tokens: int | None = None,
    scale: float | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    code_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: str = "auto",
    check: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k(codes)^T) v(codes) and its log-sum-exp (the remote half of ASTRA's
    Mixed-Precision Attention, arXiv 2505.19342 section 3).

    The key of token n and KV head h is, sub-vector s by sub-vector,
    sum_r key_codebook[r, h, s, codes[n, i(r, h, s)]], rotated if ``rope`` is given; its value the
    same from ``value_codebook``. With C0 = Hkv*S, i = r*C0 + h*S + s: every KV head has its own
    codes. With C0 = S, i = r*C0 + s: all heads share one set of codes.

    Args:
        query: [B, H, M, d], fp32, fp64, fp16 or bf16; H is a multiple of Hkv.
        codes: int32 (or int64) [B, N, C] with C = R*Hkv*S or C = R*S, values in [0, K);
            with ``code_bits`` uint8 [B, ceil(N*C*code_bits/8)], each row as ``pack`` writes it.
        key_codebook, value_codebook: [Hkv, S, K, d/S], or [R, Hkv, S, K, d/S] for R additive
            (residual) stages; any floating dtype, K up to 65,536. Sub-vectors of values may have
            another width, d_v/S. R, S and K of the two may differ if ``value_codes`` is given.
        value_codes: codes for the values alone, in the form of ``codes``; None: the same codes.
        code_bits: 1..16, when codes are packed. If a row fits both, C = R*Hkv*S is meant.
        num_tokens: N of packed codes. Otherwise taken from ``code_mask`` or ``rope``, else from
            the bytes, which is possible when a token takes 8 bits or more.
        scale: of the scores; None: 1/sqrt(d).
        rope: (cos, sin), each [N, d] or [B, N, d]: key = key*cos + rotate_half(key)*sin, after
            the lookup; rotate_half pairs channel i with i + d/2. d must be even.
        code_mask: bool [B, N], True = visible. What hidden tokens hold never matters, not even
            codes out of range.
        attn_mask, softcap, sinks: see ``attention``; attn_mask broadcasts to [B, H, M, N].
        impl: "auto", "reference", "triton" or "native"; an explicit choice never falls back.
        check: whether to read and check the values of codes; None: on the CPU only.

    Returns:
        out: [B, H, M, d_v] of query's dtype, stored as [B, M, H, d_v].
        lse: [B, H, M], natural log, fp32 (fp64 for fp64 queries).
        A query that sees no token has out 0 and lse -inf, with sinks lse = the head's sink.
        Accumulation is fp32 (fp64). The same input gives the same bits on the same number of
        threads.
        Gradients go to query, the tables, attn_mask and sinks, through out and lse. On a GPU those
        of tables are summed by atomics, in any order, but under ``use_deterministic_algorithms``.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit, a visible code out of range.
        RuntimeError: ``impl`` cannot run.

    Example:
        >>> keys, values = torch.randn(2, 2, 1, 1024, 64)  # 2 KV heads, 1024 codewords each
        >>> codes = torch.randint(0, 1024, (1, 300, 2), dtype=torch.int32)  # of 300 tokens
        >>> out, lse = ak.coded_attention(torch.randn(1, 8, 5, 64), codes, keys, values)
        >>> out.shape, lse.shape
        (torch.Size([1, 8, 5, 64]), torch.Size([1, 8, 5]))

        The same from the bytes that came over a wire:

        >>> packed = ak.pack(codes, 10)[None]  # 10 bits a code
        >>> query = torch.randn(1, 8, 5, 64)
        >>> out, lse = ak.coded_attention(query, packed, keys, values, code_bits=10)
    """
    op = "coded_attention"
    cos, sin = split_rope(op, rope)
    masked = code_mask is not None or attn_mask is not None
    if not masked and value_codes is None and softcap is None and sinks is None:
        tables = (key_codebook, value_codebook)
        quick = native.plain_coded_attention(
            *(query, codes, *tables, code_bits, num_tokens, scale, cos, sin, impl)
        )
        if quick is not None:
            return quick
    args = (
        *(query, codes, key_codebook, value_codebook, value_codes, code_bits, num_tokens, cos, sin),
        *(code_mask, attn_mask, scale, softcap, sinks, impl, check),
    )
    state: tuple[Tensor, Tensor] | None = replay.run(op, args)
    if state is not None:
        return state
    optional = {"value_codes": value_codes, "code_mask": code_mask, "cos": cos, "sin": sin}
    if attn_mask is not None or sinks is not None:
        optional |= {"attn_mask": attn_mask, "sinks": sinks}
    check_tensors(
        op,
        optional,
        query=query,
        codes=codes,
        key_codebook=key_codebook,
        value_codebook=value_codebook,
        differentiable=True,
    )
    check_scale(op, scale)
    check_softcap(op, softcap)
    with undifferentiated(query, key_codebook, value_codebook, attn_mask, sinks, cos, sin):
        out, lse = torch.ops.astra.coded_attention(*args)
    return out, lse
