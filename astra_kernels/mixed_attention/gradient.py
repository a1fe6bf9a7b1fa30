"""The gradient of attention over dense and coded tokens: each side's, and the query's added."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from astra_kernels._rotary import Rope
from astra_kernels.attention import blocks
from astra_kernels.attention.gradient import (
    Gradients,
    new_grad_mask,
    of_keys,
    of_sinks,
    softmax_of,
    with_sums,
)
from astra_kernels.attention.visibility import visibility
from astra_kernels.coded_attention import gradient as coded


def mixed_attention(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codes: Tensor,
    key_codebook: Tensor,
    value_codebook: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    value_codes: Tensor | None = None,
    rope: Rope | None = None,
    code_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    window: Sequence[int] | None = None,
    code_attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    wanted: frozenset[str],
    fast: bool = True,
) -> Gradients:
    """Gradients by the arguments' names; those of ``wanted``, and maybe more."""
    softmax = softmax_of(query, out, lse, grad_out, grad_lse, scale, softcap)
    local = visibility(query, key.shape[2], is_causal, key_mask, attn_mask, window)
    remote = visibility(query, codes.shape[1], False, code_mask, code_attn_mask)
    tokens = coded.describe(codes, key_codebook, value_codebook, value_codes, rope, code_mask)
    masked = attn_mask is not None or code_attn_mask is not None
    if query.numel() > 0 and masked and blocks.is_coarse(lse):
        sums = [blocks.sums_of(softmax, key, local), coded.sums_of(softmax, tokens, remote)]
        softmax = with_sums(softmax, sums, sinks)
    result: Gradients = {}
    for name, mask in (("attn_mask", attn_mask), ("code_attn_mask", code_attn_mask)):
        grad_mask = new_grad_mask(mask, name in wanted, lse.dtype)
        if grad_mask is not None:
            result[name] = grad_mask
    dtypes = (lse.dtype, key.dtype)
    near = of_keys(softmax, key, value, local, result.get("attn_mask"), fast, dtypes)
    same_codes = value_codes is None
    far = coded.of_codes(softmax, tokens, remote, result.get("code_attn_mask"), same_codes, fast)
    result |= {"query": near[0] + far[0], "key": near[1], "value": near[2]}
    result |= {"key_codebook": far[1], "value_codebook": far[2]}
    if "sinks" in wanted and sinks is not None:
        result["sinks"] = of_sinks(softmax, sinks)
    return result
