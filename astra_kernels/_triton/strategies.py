"""Three ways to attend to codes, and from where on which one is quickest.

fused     looks every key and value up inside the attention loop;
counted   counts the codes and attends to the codewords: constant in the number of tokens, possible
          where equal codes have equal keys (no rotary positions, one code a token and head);
expanded  looks all keys and values up once, then attends to them densely: worth its memory where
          many rows would look the same ones up again and again.

The crossovers are measured (``python -m bench.kernels``). A device that was not measured takes
``DEFAULT``, which stands on counted costs: that look-ups in the loop pay up to some 2,700 rows,
and counting from as many tokens as there are codewords on, with a margin for its launches.
"""

from __future__ import annotations

from dataclasses import dataclass

FUSED, COUNTED, EXPANDED = "fused", "counted", "expanded"
STRATEGIES = (FUSED, COUNTED, EXPANDED)


@dataclass(frozen=True)
class Crossover:
    """counted_from: tokens per codeword; expanded_from: rows, M * H / Hkv."""

    counted_from: float
    counted_from_few_rows: float
    expanded_from: int


DEFAULT = Crossover(counted_from=1.25, counted_from_few_rows=4.0, expanded_from=2700)

# Compute capability -> what was measured on such a device: 90 is an H200's.
MEASURED: dict[int, Crossover] = {
    90: Crossover(counted_from=1.014, counted_from_few_rows=16, expanded_from=259),
}


def choose(
    capability: int, *, tokens: int, codewords: int, rows: int, few_rows: bool, collapses: bool
) -> str:
    """``collapses``: whether equal codes have equal keys; ``rows``: M * H / Hkv."""
    crossover = MEASURED.get(capability, DEFAULT)
    per_codeword = crossover.counted_from_few_rows if few_rows else crossover.counted_from
    if collapses and tokens >= codewords * per_codeword:
        return COUNTED
    return EXPANDED if rows >= crossover.expanded_from else FUSED
