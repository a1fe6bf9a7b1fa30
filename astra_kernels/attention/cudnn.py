"""Dense attention by cuDNN, where that is quicker on a GPU than the Triton kernel.

torch has it behind `scaled_dot_product_attention`, which keeps the log-sum-exp to itself; the
operator below that gives both. On an H200 cuDNN took two thirds of the Triton kernel's time where
there were queries for the whole chip, and more than it where there were not, as it does not split
keys (bench/results/h200/kernels.json).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, cudnn_sdp_enabled

from astra_kernels._triton.arguments import rows_contiguous
from astra_kernels._triton.augment import NEVER, augment
from astra_kernels._triton.launch import capability, cdiv, processors
from astra_kernels._triton.sources import Counted, Dense, State

ROWS = 128  # queries of a head that one program of cuDNN's takes
FULL = 2 / 3  # of the multiprocessors, from which on it is quicker
FEWEST_KEYS = 64
MOST_CHANNELS = 128
FEWEST_AUGMENTED = 72
LEAST_SCALE = 2.0**-20  # what is added to scores is then far from the ends of its range
CAPABILITIES = range(90, 120)  # on older chips torch does not prefer it either


def attention(query: Tensor, dense: Dense, scale: float | None) -> State | None:
    """out [B, H, M, d] and lse [B, H, M], natural log, fp32; None where cuDNN is not the choice.

    It takes neither masks nor windows, and with causality as many keys as queries.
    """
    if not _quicker(query, dense) or not (scale is None or 0 < scale < math.inf):
        return None
    query, key, value = (rows_contiguous(x) for x in (query, dense.key, dense.value))
    if not _taken(query, key, value, dense.is_causal):
        return None
    return _run(query, key, value, dense.is_causal, scale)


def codeword_attention(query: Tensor, counted: Counted, scale: float | None) -> State | None:
    """The same over codewords with counts, which become channels of the keys (``augment``).

    Worth its copy of the queries for more than 64 channels: 1,024 queries, 32 heads of 128 channels
    and 1,024 codewords take cuDNN 41 µs on an H200, and the kernel of ours 65.
    """
    if not _quicker_over_codewords(query, counted):
        return None
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if not LEAST_SCALE <= scale <= 1 / LEAST_SCALE:
        return None
    query, key, value = augment(rows_contiguous(query), counted, scale)
    if not _taken(query, key, value, False):
        return None
    out, lse = _run(query, key, value, False, scale)
    # where there are no tokens; their values were 0
    return out, torch.threshold_(lse, NEVER / 2 * scale, -math.inf)


def _taken(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> bool:
    """Whether this torch and cuDNN take a call, and the user has not turned cuDNN off."""
    return bool(can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, causal, True)))


def _run(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> State:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse.view(query.shape[:3])


def _quicker_over_codewords(query: Tensor, counted: Counted) -> bool:
    dim, (counts, key, value) = query.shape[3], counted
    if query.dtype != torch.bfloat16 or key.dtype != query.dtype or value.dtype != query.dtype:
        return False
    if not FEWEST_AUGMENTED <= dim <= MOST_CHANNELS or dim % 8 or value.shape[3] != dim:
        return False
    if counts.dtype not in (torch.int32, torch.int64) or not cudnn_sdp_enabled():
        return False  # before anything is copied for it
    return key.shape[2] >= FEWEST_KEYS and _fills(query)


def _quicker(query: Tensor, dense: Dense) -> bool:
    rows, dim = query.shape[2:]
    if query.element_size() != 2:
        return False
    if dense.mask is not None or dense.attn_mask is not None or dense.window is not None:
        return False
    keys = dense.key.shape[2]
    if keys < FEWEST_KEYS or dense.value.shape[3] != dim or dim > MOST_CHANNELS or dim % 8:
        return False
    if dense.is_causal and keys != rows:
        return False
    return _fills(query)


def _fills(query: Tensor) -> bool:
    """Whether there are queries enough, on a chip that this was measured on."""
    batch, heads, rows, _ = query.shape
    if query.device.type != "cuda" or capability(query.device) not in CAPABILITIES:
        return False
    return batch * heads * cdiv(rows, ROWS) >= FULL * processors(query.device)
