"""Bit packing."""

from __future__ import annotations

import torch
from torch import Tensor

from astra_kernels._dispatch import packing
from astra_kernels._library.registration import register
from astra_kernels.pack.native import pack_tensor, unpack_tensor


def _pack(codes: Tensor, bits: int) -> Tensor:
    if codes.is_cpu:
        return pack_tensor(codes, bits)
    packed: Tensor = packing(codes.device).pack(codes, bits)
    return packed


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((codes.numel() * bits + 7) // 8, dtype=torch.uint8)


def _unpack(data: Tensor, bits: int, count: int) -> Tensor:
    if data.is_cpu:
        return unpack_tensor(data, bits, count)
    codes: Tensor = packing(data.device).unpack(data, bits, count)
    return codes


def _unpack_fake(data: Tensor, bits: int, count: int) -> Tensor:
    return data.new_empty(count, dtype=torch.int32)


register("pack(Tensor codes, int bits) -> Tensor", _pack, _pack_fake)
register("unpack(Tensor data, int bits, SymInt count) -> Tensor", _unpack, _unpack_fake)


def unpack_rows(codes: Tensor, code_bits: int, tokens: int, codes_per_token: int) -> Tensor:
    """uint8 [B, bytes] -> int32 [B, N, C]; every row starts at a byte."""
    count = tokens * codes_per_token
    if not codes.is_cpu:
        rows = packing(codes.device).unpack_rows(codes, code_bits, count)
    elif codes.shape[0] == 1:
        rows = unpack_tensor(codes[0], code_bits, count)
    else:
        rows = codes.new_empty((codes.shape[0], count), dtype=torch.int32)
        for row, packed in zip(rows, codes, strict=True):
            row.copy_(unpack_tensor(packed, code_bits, count))
    return rows.view(codes.shape[0], tokens, codes_per_token)
