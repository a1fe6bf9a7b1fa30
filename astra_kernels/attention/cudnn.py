"""Dense attention by cuDNN, where that is quicker on a GPU than the Triton kernel.

torch has it behind `scaled_dot_product_attention`, which keeps the log-sum-exp to itself; the
operator below that gives both. On an H200 cuDNN took two thirds of the Triton kernel's time where
there were queries for the whole chip, and more than it where there were not, as it does not split
keys (bench/results/h200/kernels.json).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from astra_kernels._triton.arguments import rows_contiguous
from astra_kernels._triton.launch import capability, cdiv, processors
from astra_kernels._triton.sources import Dense, State

ROWS = 128  # queries of a head that one program of cuDNN's takes
FULL = 2 / 3  # of the multiprocessors, from which on it is quicker
FEWEST_KEYS = 64
MOST_CHANNELS = 128
CAPABILITIES = range(90, 120)  # on older chips torch does not prefer it either


def attention(query: Tensor, dense: Dense, scale: float | None) -> State | None:
    """out [B, H, M, d] and lse [B, H, M], natural log, fp32; None where cuDNN is not the choice.

    It takes neither masks nor windows, and with causality as many keys as queries.
    """
    if not _quicker(query, dense) or (scale is not None and scale <= 0):
        return None
    query, key, value = (rows_contiguous(x) for x in (query, dense.key, dense.value))
    asked = SDPAParams(query, key, value, None, 0.0, dense.is_causal, True)
    if not can_use_cudnn_attention(asked):  # a version too old, or turned off by the user
        return None
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, dense.is_causal, False, scale=scale
    )
    return out, lse.view(query.shape[:3])


def _quicker(query: Tensor, dense: Dense) -> bool:
    batch, heads, rows, dim = query.shape
    if query.device.type != "cuda" or query.element_size() != 2:
        return False
    if dense.mask is not None or dense.attn_mask is not None or dense.window is not None:
        return False
    keys = dense.key.shape[2]
    if keys < FEWEST_KEYS or dense.value.shape[3] != dim or dim > MOST_CHANNELS or dim % 8:
        return False
    if dense.is_causal and keys != rows:
        return False
    if capability(query.device) not in CAPABILITIES:
        return False
    return batch * heads * cdiv(rows, ROWS) >= FULL * processors(query.device)
