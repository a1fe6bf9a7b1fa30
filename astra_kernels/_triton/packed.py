"""Packed codes as kernels read them: by words of 32 bits, which the compiler can copy ahead."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BYTES = 4


def as_words(codes: Tensor, bits: int | None) -> Tensor:
    """Packed rows uint8 [B, bytes] as int32 [B, words]; integers (``bits`` None) as they are.

    The same memory where every row is a whole number of words, else a copy of the codes.
    """
    codes = codes.contiguous()
    if not bits:
        return codes
    rows, size = codes.shape
    if size % WORD_BYTES == 0 and codes.storage_offset() % WORD_BYTES == 0:
        return codes.view(-1).view(torch.int32).view(rows, size // WORD_BYTES)
    # What the padding holds is never looked at.
    words = codes.new_empty((rows, -(-size // WORD_BYTES)), dtype=torch.int32)
    words.view(torch.uint8)[:, :size] = codes
    return words
