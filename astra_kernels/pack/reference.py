"""Bit packing spelled out: every bit of the stream is an element of a tensor. Any device, slow."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes int32 of any shape -> uint8 [ceil(codes.numel() * bits / 8)]."""
    places = torch.arange(bits, device=codes.device)
    stream = (codes.reshape(-1, 1) >> places & 1).reshape(-1)  # bit j of the stream, [count * bits]
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8))
    weights = 1 << torch.arange(8, device=codes.device)  # the least significant bit first
    return (stream.reshape(-1, 8) * weights).sum(dim=1).to(torch.uint8)


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """Data uint8 of at least ceil(count * bits / 8) elements -> int32 [count]."""
    places = torch.arange(8, device=data.device)
    stream = (data.reshape(-1, 1) >> places & 1).reshape(-1)[: count * bits]
    weights = 1 << torch.arange(bits, device=data.device)
    return (stream.reshape(count, bits) * weights).sum(dim=1).to(torch.int32)


def unpack_rows(data: Tensor, bits: int, count: int) -> Tensor:
    """Data uint8 [rows, at least ceil(count * bits / 8)] -> int32 [rows, count]."""
    rows = [unpack(row, bits, count) for row in data]
    return torch.stack(rows) if rows else data.new_empty((0, count), dtype=torch.int32)
