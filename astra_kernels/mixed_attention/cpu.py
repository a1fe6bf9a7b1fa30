"""Mixed-precision attention on a CPU: in C++ where it serves; else the two halves, then one softmax
out of both.

Halves are quicker than one flash call over concatenated keys (bench/ops.py, case `mixed_halves`):
they need no copy of the local keys and keep the causal half cheap.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from astra_kernels._rotary import Rope
from astra_kernels.attention.cpu import attention
from astra_kernels.coded_attention.cpu import coded_attention, looks_up
from astra_kernels.merge_state.cpu import merge_state
from astra_kernels.mixed_attention import native


def mixed_attention(
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
) -> tuple[Tensor, Tensor]:
    plain = attn_mask is None and window is None and code_attn_mask is None and softcap is None
    sizes = (codes.shape[1], codes.shape[2])
    if plain and looks_up(query, sizes, key_codebook, rope, value_codes):
        return native.mixed_attention(
            *(query, key, value, codes, key_codebook, value_codebook),
            is_causal=is_causal,
            key_mask=key_mask,
            scale=scale,
            value_codes=value_codes,
            rope=rope,
            code_mask=code_mask,
            sinks=sinks,
        )
    local = attention(
        query,
        key,
        value,
        is_causal=is_causal,
        key_mask=key_mask,
        scale=scale,
        attn_mask=attn_mask,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    if codes.shape[1] == 0:
        return local
    remote = coded_attention(
        query,
        codes,
        key_codebook,
        value_codebook,
        value_codes=value_codes,
        scale=scale,
        rope=rope,
        code_mask=code_mask,
        attn_mask=code_attn_mask,
        softcap=softcap,
    )
    return merge_state(*local, *remote)
