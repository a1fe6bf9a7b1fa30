"""Vector quantization: codes back to codewords."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._autograd import undifferentiated
from astra_kernels._checks import check_tensors

__all__ = ["decode"]


def decode(
    codes: Tensor, codebook: Tensor, *, impl: str = "auto", check: bool | None = None
) -> Tensor:
    """vectors[..., c, :] = codebook[c, codes[..., c], :], exactly.

    Args:
        codes: int32 (or int64) [..., C], values in [0, K).
        codebook: [C, K, w], fp32, fp64, fp16 or bf16.
        impl: "auto", "reference" or "triton"; an explicit choice never falls back.
        check: whether to read and check the values of codes; None: on the CPU only.

    Returns:
        [..., C, w] of the codebook's dtype. Deterministic.
        Gradients go to codebook. On a GPU they are summed by atomics, in any order, but under
        ``use_deterministic_algorithms``.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit, a code out of range.
        RuntimeError: ``impl`` cannot run here.

    Example:
        >>> codebook = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])  # C = 1, K = 2, w = 2
        >>> ak.decode(torch.tensor([[1], [0]], dtype=torch.int32), codebook)
        tensor([[[1., 1.]],
        <BLANKLINE>
                [[0., 0.]]])
    """
    kept: Tensor | None = replay.run("decode", (codes, codebook, impl, check))
    if kept is not None:
        return kept
    check_tensors("decode", codes=codes, codebook=codebook, differentiable=True)
    with undifferentiated(codebook):
        vectors: Tensor = torch.ops.astra.decode(codes, codebook, impl, check)
    return vectors
