"""Kernels that do one thing as fast as a chip can: exponentials, and reading rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bench.kernels.timing import Call

ROW = 64  # 32-bit words: a codeword of 128 16-bit values
CODEWORDS, HEADS = 1024, 8  # the tables take 2 MiB, which every L2 cache holds
BLOCK_CODES, BLOCK_EXP, ROUNDS = 32, 1024, 256


@dataclass(frozen=True)
class Probe:
    """A call, and how many units of work it does."""

    call: Call
    work: float


@triton.jit
def _gather_kernel(
    p_codes, p_table, p_out, codes_a_program, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds up the rows that a run of codes names: reads all of them, writes one row."""
    program = tl.program_id(0)
    o_word = tl.arange(0, ROW)
    total = tl.zeros([BLOCK, ROW], tl.int32)
    first = program * codes_a_program
    for start in range(0, codes_a_program, BLOCK):
        codes = tl.load(p_codes + first + start + tl.arange(0, BLOCK))
        total += tl.load(p_table + codes[:, None] * ROW + o_word[None, :])
    tl.store(p_out + program * ROW + o_word, tl.sum(total, axis=0))


@triton.jit
def _exp_kernel(p_out, rounds, BLOCK: tl.constexpr):
    """A chain of exponentials for every element; several a thread, which do not wait in turn."""
    o_element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (o_element % 128).to(tl.float32) * -0.01
    for _ in range(rounds):
        x = -tl.exp2(x)
    tl.store(p_out + o_element, x)


def gather(codes: torch.Tensor, table: torch.Tensor, programs: int) -> torch.Tensor:
    """int32 [programs, w]: each program's share of `codes` [n], as rows of `table` [R, w], added.

    n has to be a multiple of 32 times the number of programs.
    """
    out = torch.empty(programs, table.shape[1], dtype=torch.int32, device=table.device)
    each = codes.numel() // programs
    if each * programs != codes.numel() or each % BLOCK_CODES:
        raise ValueError(
            f"codes: expected a multiple of {programs * BLOCK_CODES} codes, got {codes.numel()}"
        )
    _gather_kernel[(programs,)](codes, table, out, each, ROW=table.shape[1], BLOCK=BLOCK_CODES)
    return out


def exponentials(programs: int, rounds: int, device: torch.device) -> torch.Tensor:
    """fp32 [programs * 1024]: x -> -2**x, `rounds` times."""
    out = torch.empty(programs * BLOCK_EXP, device=device)
    _exp_kernel[(programs,)](out, rounds, BLOCK=BLOCK_EXP)
    return out


def probes(device: torch.device, *, small: bool) -> dict[str, Probe]:
    """`gather`, in bytes read, and `exp`."""
    programs, rounds = 4096, ROUNDS
    count = 2**22
    if small:
        programs, rounds, count = 2, 4, 2 * BLOCK_CODES
    table = torch.randint(0, 2**20, (HEADS * CODEWORDS, ROW), dtype=torch.int32, device=device)
    codes = torch.randint(0, len(table), (count,), dtype=torch.int32, device=device)
    return {
        "gather": Probe(lambda: gather(codes, table, programs), 4.0 * ROW * count),
        "exp": Probe(
            lambda: exponentials(programs, rounds, device), float(programs * BLOCK_EXP * rounds)
        ),
    }
