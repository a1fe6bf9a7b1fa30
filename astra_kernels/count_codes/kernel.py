"""Counting codes in Triton, packed ones where they lie.

A program counts one position of one batch row over a share of the tokens. Few codewords are counted
in the program and then added to the counts in memory: were codes skewed, as they are, adding each
at once would queue on few addresses. Sums of integers do not depend on the order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from astra_kernels._triton.blocks import read_codes, split_of
from astra_kernels._triton.launch import cdiv, launch, next_power_of_2, processors
from astra_kernels._triton.packed import as_words

# Read at a time. What a histogram costs grows little with them, but few tokens are few programs.
TOKENS, OF_MANY, MANY = 1024, 2048, 32_768
WARPS = 4
PROGRAMS = 4  # for each multiprocessor

# With 4,096 bins Triton 3.6 runs out of registers; most of so many are empty besides.
MOST_BINS = 2048
FEWEST_BINS = 32


@triton.jit(do_not_specialize=["codes_b", "tokens", "codewords", "codes_per_token"])
def count_shares(
    codes, codes_b, code_mask, counts,  # stride of B; mask [B, N]; int32 [B, C, K]
    tokens, codewords, codes_per_token,  # N, K, C
    BITS: tl.constexpr, MASK: tl.constexpr, BINS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """BINS is K padded, 0: add every code to memory at once."""
    batch = (tl.program_id(0) // codes_per_token).to(tl.int64)
    code_of_token = tl.program_id(0) % codes_per_token
    first, last = split_of(tokens, TOKENS)
    codes += batch * codes_b
    counts += tl.program_id(0).to(tl.int64) * codewords
    if BINS:
        total = tl.zeros([BINS], tl.int32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        token_mask = token < last
        if MASK:
            token_mask = token_mask & (
                tl.load(code_mask + batch * tokens + token, mask=token_mask, other=0) != 0
            )
        index = token.to(tl.int64) * codes_per_token + code_of_token
        code = read_codes(codes, index, token_mask, codewords, BITS)
        if BINS:
            total += tl.histogram(code, BINS, token_mask)
        else:
            one = tl.full([TOKENS], 1, tl.int32)
            tl.atomic_add(counts + code, one, mask=token_mask, sem="relaxed")
    if BINS:
        tl.atomic_add(counts + tl.arange(0, BINS), total, mask=total > 0, sem="relaxed")


def count_codes(
    codes: Tensor,
    codewords: int,
    *,
    code_mask: Tensor | None = None,
    code_bits: int | None = None,
    num_tokens: int | None = None,
    codes_per_token: int | None = None,
) -> Tensor:
    """codes: integers [B, N, C], or uint8 [B, bytes] with all of the last three arguments."""
    codes = as_words(codes, code_bits)
    batch = codes.shape[0]
    tokens = codes.shape[1] if num_tokens is None else num_tokens
    places = codes.shape[2] if codes_per_token is None else codes_per_token
    counts = codes.new_zeros((batch, places, codewords), dtype=torch.int32)
    if tokens == 0 or counts.numel() == 0:
        return counts
    bins = max(next_power_of_2(codewords), FEWEST_BINS)
    at_once = TOKENS if tokens < MANY else OF_MANY
    wanted = cdiv(PROGRAMS * processors(codes.device), batch * places)
    launch(
        count_shares,
        (batch * places, min(wanted, cdiv(tokens, at_once))),
        codes,
        codes.stride(0),
        None if code_mask is None else code_mask.contiguous(),
        counts,
        tokens,
        codewords,
        places,
        device=codes.device,
        warps=WARPS,
        stages=1,
        BITS=code_bits or 0,
        MASK=code_mask is not None,
        BINS=bins if bins <= MOST_BINS else 0,
        TOKENS=at_once,
    )
    return counts
