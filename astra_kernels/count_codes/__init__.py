"""How often each codeword occurs: what attention over codewords needs to know of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._checks import check_tensors

__all__ = ["count_codes"]


def count_codes(
    codes: Tensor,
    codewords: int,
    *,
    code_bits: int | None = None,
    num_tokens: int | None = None,
    codes_per_token: int | None = None,
    code_mask: Tensor | None = None,
    impl: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """counts[b, c, k] = how many visible tokens n have codes[b, n, c] == k.

    With one code a token and KV head (C = Hkv), or one for all heads (C = 1), these are the counts
    of ``codeword_attention``; counts of disjoint sets of tokens add up.

    Args:
        codes: int32 (or int64) [B, N, C], values in [0, K); with ``code_bits`` uint8
            [B, ceil(N*C*code_bits/8)], each row as ``pack`` writes it.
        codewords: K, 1 to 65,536.
        code_bits: 1..16, when codes are packed.
        num_tokens: N of packed codes. Otherwise taken from ``code_mask``, else from the bytes,
            which is possible when a token takes 8 bits or more.
        codes_per_token: C; to be given with ``code_bits``, else codes tell it.
        code_mask: bool [B, N], True = visible. What hidden tokens hold never matters, not even
            codes out of range.
        impl: "auto", "reference" or "triton"; an explicit choice never falls back.
        check: whether to read and check the values of codes; None: on the CPU only. Unchecked, the
            Triton kernel counts a code out of range as the last codeword, K - 1; what the other
            implementations do with it is unspecified.

    Returns:
        int32 [B, C, K]. Deterministic.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit, a visible code out of range.
        RuntimeError: ``impl`` cannot run here.

    Example:
        >>> codes = torch.tensor([[[0], [2], [2]]], dtype=torch.int32)  # B = 1, N = 3, C = 1
        >>> ak.count_codes(codes, 4)
        tensor([[[1, 0, 2, 0]]], dtype=torch.int32)
    """
    args = (codes, codewords, code_bits, num_tokens, codes_per_token, code_mask, impl, check)
    kept: Tensor | None = replay.run("count_codes", args)
    if kept is not None:
        return kept
    check_tensors("count_codes", {"code_mask": code_mask}, codes=codes)
    counts: Tensor = torch.ops.astra.count_codes(*args)
    return counts
