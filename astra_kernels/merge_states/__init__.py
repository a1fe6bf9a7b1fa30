"""One softmax out of any number of partial ones."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels import _replay as replay
from astra_kernels._autograd import undifferentiated
from astra_kernels._checks import check_tensors

__all__ = ["merge_states"]


def merge_states(outs: Tensor, lses: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """lse = ln sum_s exp lses[s]; out = sum_s exp(lses[s] - lse) outs[s].

    Attention over disjoint sets of keys, merged, is attention over their union. Of the states only
    one may have been made with ``sinks``.

    Args:
        outs: [S, ..., d], fp32, fp64, fp16 or bf16: S states (attention gives [B, H, M, d] each).
        lses: [S, ...], natural log, fp32 or fp64.
        impl: "auto", "reference" or "triton"; an explicit choice never falls back.

    Returns:
        out: [..., d] of outs' dtype, contiguous. lse: [...] of lses' dtype.
        A state whose lse is -inf has no say, whatever its out holds; where all are, and where
        S = 0, out is 0 and lse -inf. Where an lse is NaN or +inf (which some libraries give for an
        empty side: replace it by -inf), out and lse are NaN. Deterministic.
        Gradients go to both inputs, through out and lse.

    Raises:
        TypeError: a dtype that is not listed.
        ValueError: shapes or devices that do not fit.
        RuntimeError: ``impl`` cannot run here.

    Example:
        >>> query, key, value = torch.randn(3, 1, 8, 6, 64).unbind()
        >>> parts = [ak.attention(query, key[:, :, i::3], value[:, :, i::3]) for i in range(3)]
        >>> outs, lses = (torch.stack(states) for states in zip(*parts))
        >>> out, lse = ak.merge_states(outs, lses)
        >>> torch.allclose(out, ak.attention(query, key, value)[0], atol=1e-5)
        True
    """
    state: tuple[Tensor, Tensor] | None = replay.run("merge_states", (outs, lses, impl))
    if state is not None:
        return state
    check_tensors("merge_states", outs=outs, lses=lses, differentiable=True)
    with undifferentiated(outs, lses):
        out, lse = torch.ops.astra.merge_states(outs, lses, impl)
    return out, lse
