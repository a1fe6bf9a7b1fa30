"""Vector quantization straight to the bytes that are sent."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._checks import check_tensors

__all__ = ["encode_packed"]


def encode_packed(
    vectors: Tensor,
    codebook: Tensor,
    code_bits: int,
    *,
    half_norms: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``encode``'s codes, packed: what ``coded_attention`` reads with the same ``code_bits``.

    Args:
        vectors: [B, N, C, w], fp32, fp64, fp16 or bf16; C sub-vectors (groups) of w channels.
        codebook: [C, K, w], any of these dtypes, K from 1 to 2**code_bits codewords a group.
        code_bits: bits of a code, 1 to 16.
        half_norms: [C, K], ||codeword||^2 / 2 in fp32 (fp64), if at hand; saves its computation.
        impl: "auto", "reference" or "triton"; an explicit choice never falls back.

    Returns:
        uint8 [B, ceil(N*C*code_bits/8)] in ``pack``'s layout: code i of a batch row, i = n*C + c,
        at its bits [i*code_bits, (i+1)*code_bits), least significant bit first. Every row starts at
        a byte; unused bits of its last byte are zero.

    Distances, ties and what is not finite: as ``encode``.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes, devices or a number of bits that do not fit.
        RuntimeError: an input requires grad, or ``impl`` cannot run here.

    Example:
        >>> vectors, codebook = torch.randn(1, 300, 2, 64), torch.randn(2, 1024, 64)
        >>> packed = ak.encode_packed(vectors, codebook, 10)
        >>> packed.shape  # 300 tokens of 2 codes of 10 bits
        torch.Size([1, 750])
        >>> codes = ak.unpack(packed[0], 10, 600).view(1, 300, 2)
        >>> torch.equal(codes, ak.encode(vectors, codebook))
        True
    """
    args = (vectors, codebook, code_bits, half_norms, impl)
    kept: Tensor | None = replay.run("encode_packed", args)
    if kept is not None:
        return kept
    optional = {"half_norms": half_norms}
    check_tensors("encode_packed", optional, vectors=vectors, codebook=codebook)
    packed: Tensor = torch.ops.astra.encode_packed(*args)
    return packed
