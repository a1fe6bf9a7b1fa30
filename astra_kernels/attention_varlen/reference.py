"""Attention of sequences laid end to end, slow and obvious: one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from astra_kernels.attention import reference


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    starts, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts) - 1):
        rows, seen = slice(starts[b], starts[b + 1]), slice(keys[b], keys[b + 1])
        one = (tensor.transpose(0, 1)[None] for tensor in (query[rows], key[seen], value[seen]))
        out, lse = reference.attention(*one, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)
