"""Vector quantization: the nearest codeword of every sub-vector."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._checks import check_tensors

__all__ = ["encode"]


def encode(
    vectors: Tensor,
    codebook: Tensor,
    *,
    half_norms: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """code[..., c] = argmin_k ||vectors[..., c, :] - codebook[c, k, :]||^2 (grouped VQ, ASTRA 3).

    Args:
        vectors: [..., C, w], fp32, fp64, fp16 or bf16; C sub-vectors (groups) of w channels.
        codebook: [C, K, w], any of these dtypes, K from 1 to 65,536 codewords a group.
        half_norms: [C, K], ||codeword||^2 / 2 in fp32 (fp64), if at hand; saves its computation.
        impl: "auto", "reference", "triton" or "native"; an explicit choice never falls back.

    Returns:
        int32 [..., C] with values in [0, K).

    Distances are taken in fp32, or in fp64 if an input is fp64, also for half-precision inputs.
    Ties go to the lowest index. The reference sums squared differences; the fast paths compare
    ||c||^2 / 2 - x.c, so codewords whose distances differ by no more than rounding of that
    difference may be told apart differently, on a CPU also by how many vectors are encoded at once;
    of equal codewords it is the lowest on every path. A
    distance that is NaN (a NaN in the vector or the codeword) counts as infinite: such a codeword
    is never preferred to a finite one, and a vector with a NaN gets code 0.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit.
        RuntimeError: an input requires grad, or ``impl`` cannot run here.

    Example:
        >>> codebook = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])  # C = 1, K = 2, w = 2
        >>> ak.encode(torch.tensor([[[0.9, 1.2]], [[0.1, 0.3]]]), codebook)
        tensor([[1],
                [0]], dtype=torch.int32)
    """
    kept: Tensor | None = replay.run("encode", (vectors, codebook, half_norms, impl))
    if kept is not None:
        return kept
    optional = {"half_norms": half_norms}
    check_tensors("encode", optional, vectors=vectors, codebook=codebook)
    codes: Tensor = torch.ops.astra.encode(vectors, codebook, half_norms, impl)
    return codes
