"""A linear layer whose input is looked up: the hidden states are never written to memory.

A matrix product, out = x W^T, whose left operand is gathered: a program owns a tile of tokens and
one of outputs, and goes over the channels in steps of DEPTH. Within a step, runs of VECTOR
neighbouring channels belong to one sub-vector, so that a code is read once a run and its part of
the codeword as one contiguous vector.

The norm is folded in. A program sees whole rows of x, so it gathers their statistics while it
multiplies x as it is, and corrects the product at the end:
    y = (x W^T - mean rowsum(W)) rstd + b.
Taken literally this cancels where |mean| is much larger than the deviation: in E[x^2] - mean^2, and
in the product, as x loses digits when it is rounded for the tensor cores. So layer norm works on
x - s, where s is the mean of the row's first DEPTH channels (which are looked up once more). With n
channels of D in it, |s - mean| <= sqrt(D / n) deviations (Cauchy-Schwarz), whatever the mean. RMS
norm subtracts nothing. All sums are fp32. In fp16, x - s (RMS norm: x) must stay below 65,504.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from astra_kernels._triton.blocks import read_codes, run_length
from astra_kernels._triton.expand import expand
from astra_kernels._triton.launch import capability, cdiv, launch, next_power_of_2, processors
from astra_kernels._triton.packed import as_words
from astra_kernels._triton.tiles import Problem, Tile, choose

# Tiles of outputs that run beside each other: they gather the same tokens, which then come from L2.
# Not all outputs at once: a weight that does not fit L2 would be streamed for every tile of tokens.
GROUPED = 8

NOTHING, RMS, LAYER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_NORMS = {None: 0, "rms": 1, "layer": 2}


@triton.jit
def look_up_step(
    codes, offset, table, first, row_mask, codewords,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Channels [first, first + DEPTH) of looked-up states: [n, DEPTH], 0 beyond the last channel.

    A token's codes start at ``offset`` of ``codes`` (both [n]); ``row_mask`` [n] masks tokens. Of
    the table's dtype, or fp32 where stages were summed.
    """
    VECTOR: tl.constexpr = run_length(0, DEPTH, WIDTH)
    channel = tl.arange(0, VECTOR)
    run = first + (tl.arange(0, DEPTH // VECTOR) * VECTOR)[None, :]
    group = run // WIDTH
    mask = row_mask[:, None]
    if GROUPS * WIDTH % DEPTH != 0:
        mask = mask & (run < GROUPS * WIDTH)
    total = tl.zeros([1], tl.float32)
    for stage in tl.static_range(STAGES):
        code = read_codes(
            codes[:, None], offset[:, None] + stage * GROUPS + group, mask, codewords, BITS
        )
        row = (stage * GROUPS + group) * codewords + code
        # Not run % WIDTH: Triton 3.6 forgets what divides a remainder of the loop's variable, and
        # would read two bytes at a time.
        start = table + row.to(tl.int64) * WIDTH + (run - group * WIDTH)
        if VECTOR == DEPTH:
            vectors = tl.load(start + channel[None, :], mask=mask, other=0.0)
        else:
            vectors = tl.load(start[:, :, None] + channel, mask=mask[:, :, None], other=0.0)
            vectors = vectors.reshape(offset.shape[0], DEPTH)
        if STAGES == 1:
            total = vectors
        else:
            total += vectors.to(tl.float32)
    return total


@triton.jit(do_not_specialize=["codes_b", "batch_tokens", "tokens", "codewords"])
def lookup_linear_kernel(
    codes, codes_b, table, weight, bias, weight_sum,  # integers or words; [R, C, K, w], [out, D]
    estimate, new_estimate, out,  # [T, D], [T, D], [T, out]
    batch_tokens, tokens, outputs, codewords, eps,  # N, T = B*N, out, K
    STAGES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,  # R, C, w
    BITS: tl.constexpr, ESTIMATE: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = GROUPS * WIDTH
    SAMPLED: tl.constexpr = DEPTH if DEPTH < CHANNELS else CHANNELS
    row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(tokens, ROWS), tl.maximum(tl.cdiv(outputs, COLUMNS), 1), GROUPED
    )
    token = (row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_mask = token < tokens
    writes = token < tl.where(column_tile == 0, tokens, 0)  # the new estimate
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < outputs
    offset = token * (STAGES * GROUPS)
    code_rows = codes + tl.zeros_like(token)
    if BITS:  # packed rows start at a byte each
        offset = (token % batch_tokens) * (STAGES * GROUPS)
        code_rows += (token // batch_tokens) * codes_b
    channel = tl.arange(0, DEPTH)
    state = token[:, None] * CHANNELS + channel[None, :]
    weights = weight + column.to(tl.int64)[:, None] * CHANNELS + channel[None, :]

    shift = tl.zeros([ROWS], tl.float32)
    if NORM == LAYER:
        sample = look_up_step(
            code_rows, offset, table, 0, row_mask, codewords, STAGES, GROUPS, WIDTH, DEPTH, BITS
        ).to(tl.float32)
        if ESTIMATE:
            known = row_mask[:, None] & (channel < CHANNELS)[None, :]
            sample = add(estimate + state, sample, known).to(tl.float32)
        shift = tl.sum(sample, 1) / SAMPLED

    total = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, CHANNELS, DEPTH):
        x = look_up_step(
            code_rows, offset, table, first, row_mask, codewords, STAGES, GROUPS, WIDTH, DEPTH, BITS
        )
        mask = row_mask[:, None]
        loaded = column_mask[:, None]
        if CHANNELS % DEPTH != 0:
            mask = mask & (first + channel < CHANNELS)[None, :]
            loaded = loaded & (first + channel < CHANNELS)[None, :]
        if ESTIMATE:
            x = add(estimate + state + first, x, mask)
            tl.store(new_estimate + state + first, x, mask=mask & writes[:, None])
        if NORM != NOTHING:
            x = x.to(tl.float32)
            if NORM == LAYER:
                x = tl.where(mask, x - shift[:, None], 0.0)
                total += tl.sum(x, 1)
            squares += tl.sum(x * x, 1)
        part = tl.load(weights + first, mask=loaded, other=0.0)
        acc = tl.dot(x.to(part.dtype), tl.trans(part), acc, input_precision=PRECISION)

    if NORM != NOTHING:
        mean = total / CHANNELS  # of x - shift
        variance = tl.maximum(squares / CHANNELS - mean * mean, 0.0)
        if NORM == LAYER:
            acc -= (
                mean[:, None] * tl.load(weight_sum + column, mask=column_mask, other=0.0)[None, :]
            )
        acc *= tl.rsqrt(variance + eps)[:, None]
    if BIAS:
        acc += tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    target = out + token[:, None] * outputs + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUPED: tl.constexpr):
    """Which (row tile, column tile) a program works on: GROUPED columns, then the next rows."""
    group = program // (GROUPED * row_tiles)
    within = program % (GROUPED * row_tiles)
    columns = tl.minimum(column_tiles - group * GROUPED, GROUPED)
    return within // columns, group * GROUPED + within % columns


@triton.jit
def add(estimate, x, mask):
    """The running estimate at pointers ``estimate``, refined by x and rounded to its dtype."""
    old = tl.load(estimate, mask=mask, other=0.0)
    return (old.to(tl.float32) + x.to(tl.float32)).to(old.dtype)


@dataclass(frozen=True)
class LookupLinear(Problem):
    """``itemsize`` is the weight's."""

    table_itemsize: int
    estimate_itemsize: int  # 0: there is none
    stages: int  # additive ones, of the codebook
    packed: bool
    norm: bool
    run: int  # largest power of two that divides w: neighbouring channels of one sub-vector
    tokens: int  # up to the next power of two, as outputs
    outputs: int
    processors: int

    def tiles(self) -> Sequence[Tile]:
        """The largest that keeps half the processors busy, then smaller ones, then the rest."""
        tiles = _TILES_OF_4_BYTES if self.itemsize == 4 else _TILES_OF_2_BYTES
        filling = [tile for tile in tiles if 2 * self._programs(tile) >= self.processors]
        idle = [tile for tile in tiles if tile not in filling]
        return [*filling, *reversed(idle), _LAST_RESORT]

    def _programs(self, tile: Tile) -> int:
        return cdiv(self.tokens, tile.rows) * cdiv(self.outputs, tile.columns)

    def shared_bytes(self, tile: Tile) -> int:
        """As many buffers a load as steps it runs ahead, and one more of what the dot reads.

        Codes, or the two words of a packed one, are read before the codewords, so each of the two
        runs half the stages ahead. Triton 3.6 reads an estimate as far ahead as it can.
        """
        ahead = (tile.stages - 1) // 2
        codes = 8 * (tile.depth // min(self.run, tile.depth))
        looked_up = self.stages * (codes + tile.depth * self.table_itemsize)
        step = tile.rows * looked_up + tile.columns * tile.depth * self.itemsize
        estimate = (tile.stages - 1) * tile.rows * tile.depth * self.estimate_itemsize
        operands = (tile.rows + tile.columns) * tile.depth * self.itemsize
        parts = 2 if self.itemsize == 4 else 1  # tf32x3 splits an operand in two
        return ahead * step + estimate + parts * operands + _BARRIERS

    def registers(self, tile: Tile) -> int:
        """The sums; a step's rows as they are loaded, added, normalized; addresses of its codes."""
        idle = not self.norm and not self.estimate_itemsize and self.stages == 1
        held = tile.columns + (1 if idle else 3) * tile.depth
        codes = self.stages * tile.depth // min(self.run, tile.depth)
        held += (6 if self.packed else 3) * codes  # a packed one lies in up to two words
        if self.capability // 10 not in (9, 10):  # operands come from registers there
            held += tile.columns
        return tile.rows * held // (32 * tile.warps) + 64


_BARRIERS = 256  # bytes; Blackwell's matrix unit signals through shared memory

# Rows, columns, warps, stages, depth; larger ones first. Five stages: two reads follow on each
# other, and each is to be two steps ahead.
_TILES_OF_2_BYTES = (
    Tile(128, 128, 8, 5, 64),
    Tile(128, 128, 8, 3, 64),
    Tile(128, 64, 8, 5, 64),
    Tile(64, 64, 4, 5, 64),
    Tile(32, 64, 4, 5, 64),
    Tile(16, 64, 4, 5, 64),
    Tile(16, 32, 4, 5, 64),
)
_TILES_OF_4_BYTES = (
    Tile(64, 64, 8, 5, 32),
    Tile(64, 64, 8, 3, 32),
    Tile(32, 64, 8, 5, 32),
    Tile(16, 32, 4, 5, 32),
)
_LAST_RESORT = Tile(16, 32, 4, 3, 16)  # many additive stages on a chip of little shared memory


def lookup_linear(
    codes: Tensor,
    codebook: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    estimate: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
    code_bits: int = 0,
    num_tokens: int = 0,
    library: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Codes [..., R*C], or packed, uint8 [B, bytes], where there are ``code_bits``.

    ``library``: looked up first and multiplied by cuBLAS, which is quicker where there is memory
    for the hidden states: on an H200 0.039 ms beside 0.053 for one group and 0.194 for 32 (8,192
    tokens, 768 channels to 1,536).
    """
    stages, groups, codewords, width = (1, *codebook.shape)[-4:]
    lead = codes.shape[:-1] if not code_bits else (codes.shape[0], num_tokens)
    if library:
        plain = estimate is None and norm is None and stages == 1
        dtype = codebook.dtype if plain else torch.float32
        hidden = _hidden(codes, codebook, lead, code_bits or None, dtype)
        return _project(hidden, weight, bias, estimate, norm, eps)
    outputs = weight.shape[0]
    out = weight.new_empty((*lead, outputs))
    new_estimate = None if estimate is None else estimate.new_empty(estimate.shape)
    tokens = math.prod(lead)
    weight = weight.contiguous()
    weight_sum = weight.sum(1, dtype=torch.float32) if norm == "layer" else weight
    problem = LookupLinear(
        capability(weight.device), weight.itemsize, codebook.itemsize,
        0 if estimate is None else estimate.itemsize, stages, bool(code_bits), norm is not None,
        width & -width,  # the lowest bit
        next_power_of_2(tokens), next_power_of_2(outputs), processors(weight.device),
    )  # fmt: skip
    tile = choose(problem)
    codes = as_words(codes, code_bits)
    launch(
        lookup_linear_kernel,
        # Without outputs there may still be an estimate to refine.
        (cdiv(tokens, tile.rows) * max(cdiv(outputs, tile.columns), 1),),
        codes, codes.stride(0) if code_bits else 0, codebook.contiguous(), weight,
        weight if bias is None else bias.contiguous(), weight_sum,
        weight if estimate is None else estimate.contiguous(),
        weight if new_estimate is None else new_estimate, out,
        num_tokens, tokens, outputs, codewords, eps,
        STAGES=stages, GROUPS=groups, WIDTH=width, BITS=code_bits,
        ESTIMATE=estimate is not None, NORM=_NORMS[norm], BIAS=bias is not None,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUPED=GROUPED,
        PRECISION="tf32x3" if weight.dtype == torch.float32 else "ieee",
        device=weight.device, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return out, new_estimate


def _hidden(
    codes: Tensor, codebook: Tensor, lead: Sequence[int], code_bits: int | None, dtype: torch.dtype
) -> Tensor:
    """What codes stand for, [..., D] of ``dtype``."""
    tables = codebook if codebook.ndim == 4 else codebook.unsqueeze(0)  # [R, C, K, w]
    batch, tokens = (1, math.prod(lead)) if code_bits is None else (lead[0], lead[1])
    if code_bits is None:
        codes = codes.reshape(1, tokens, codes.shape[-1])
    hidden = expand(
        *(codes, tables.unsqueeze(1), batch, tokens), shared=True, code_bits=code_bits, dtype=dtype
    )
    return hidden.reshape(*lead, hidden.shape[-1])


def _project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    estimate: Tensor | None,
    norm: str | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """As the kernel: sums and norms in fp32, the product in weight's dtype."""
    new_estimate = None
    if estimate is not None:
        hidden = new_estimate = (estimate.float() + hidden.float()).to(estimate.dtype)
    if norm == "rms":
        hidden = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=eps)
    elif norm == "layer":
        hidden = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=eps)
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(hidden.to(weight.dtype), weight, bias), new_estimate
