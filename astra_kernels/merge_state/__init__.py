"""One softmax out of two partial ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._autograd import undifferentiated
from astra_kernels._checks import check_tensors

__all__ = ["merge_state"]


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """lse = ln(exp lse_a + exp lse_b); out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b.

    Attention over two disjoint sets of keys, merged, is attention over their union, whatever the
    split: this joins local attention with attention over codes.

    Args:
        out_a, out_b: [..., d] (attention gives [B, H, M, d]), of one shape and dtype.
        lse_a, lse_b: [...], natural log, fp32 or fp64, of one dtype.
        impl: "auto", "reference" or "triton"; an explicit choice never falls back.

    Returns:
        out like out_a in dtype and layout, lse [...] of the inputs' dtype. A side whose lse is
        -inf has no say, whatever its out holds; two such sides give out 0 and lse -inf. Where an
        lse is NaN or +inf (which some libraries give for an empty side: replace it by -inf), out
        and lse are NaN. The weights are taken in the dtype of lse. Deterministic.
        Gradients go to all four inputs, through out and lse.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit.
        RuntimeError: ``impl`` cannot run here.

    Example:
        >>> query, key, value = torch.randn(3, 1, 8, 6, 64).unbind()
        >>> near = ak.attention(query, key[:, :, :2], value[:, :, :2])
        >>> far = ak.attention(query, key[:, :, 2:], value[:, :, 2:])
        >>> out, lse = ak.merge_state(*near, *far)
        >>> torch.allclose(out, ak.attention(query, key, value)[0], atol=1e-5)
        True
    """
    args = (out_a, lse_a, out_b, lse_b, impl)
    state: tuple[Tensor, Tensor] | None = replay.run("merge_state", args)
    if state is not None:
        return state
    sides: dict[str, Any] = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    check_tensors("merge_state", differentiable=True, **sides)
    with undifferentiated(out_a, lse_a, out_b, lse_b):
        out, lse = torch.ops.astra.merge_state(*args)
    return out, lse
