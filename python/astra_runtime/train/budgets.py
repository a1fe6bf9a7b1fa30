"""Transform codes within a budget of bits, or with as few as a target takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..codes.codebook import Codebook, geometry
from ..models import Adapter, Inputs, adapt
from .calibration import Progress, record
from .fit_transform import Cost, Rows, allocate, embedding_of, fit_blocks, sensitivity

SENSITIVITY_WINDOWS = 8  # a backward pass each; F needs no more
DEFAULT_BITS = 100.0
MANY_BITS = 200.0  # beyond, groups are so many that each has few codewords
TARGET_FROM, TARGET_LEAST, TARGET_MOST = 40.0, 5.0, 1280.0  # budgets tried for a target


class TransformFit:
    """Codebooks of any budgets from one look at the calibration windows.

    Args:
        windows: of `recording.as_windows`.

    Attributes:
        empty: all of a codebook but its transforms and what follows from them.
    """

    def __init__(
        self, model: nn.Module, windows: list[Inputs], settings: Settings, progress: Progress
    ) -> None:
        adapter = adapt(model)
        self.settings, self.progress = settings, progress
        vectors = sum(batch * tokens for batch, tokens in map(adapter.count, windows))
        notes = {
            "calibration_vectors": vectors,
            "iterations": settings.iterations,
            "seed": settings.seed,
        }
        self.empty = Codebook(
            "transform",
            prefix=settings.prefix,
            geometry=geometry(adapter),
            model=adapter.digest(),
            notes=notes,
        )
        few = windows[:: max(1, len(windows) // SENSITIVITY_WINDOWS)][:SENSITIVITY_WINDOWS]
        prefix = settings.prefix
        progress("weighing", 0, 1)
        fisher = sensitivity(model, few, prefix=prefix, world_size=4, seed=settings.seed)
        progress("weighing", 1, 1)
        recorded = record(adapter, "kv", windows, progress, prefix)
        copies, embedding = adapter.class_tokens + prefix, None
        if adapter.token_ids:
            found = [embedding_of(adapter, window)[:, copies:].flatten(0, 1) for window in windows]
            embedding = torch.cat(found)
        pairs = [recorded.pairs(block) for block in range(len(adapter.blocks))]
        self.rows, self.cost = Rows(pairs, embedding), Cost.of(fisher.to(adapter.device))

    def codebook(self, bits: float) -> Codebook:
        """At most `bits` a token and block, on average over the blocks."""
        settings, blocks, words = self.settings, len(self.rows.blocks), self.settings.words(bits)
        with torch.no_grad():  # not inference mode: the tensors made here may be trained with
            counts = allocate(self.rows, self.cost, bits, (words - 1).bit_length())
            made = fit_blocks(
                self.rows,
                self.cost,
                counts,
                codewords=words,
                rank=settings.rank,
                iterations=settings.iterations,
                seed=settings.seed,
                progress=lambda block: self.progress("clustering", block + 1, blocks),
            )
        codes = [t.codes for t in made]
        notes = {**self.empty.notes, "bits": bits, "rank": settings.rank, "codes": codes}
        return replace(self.empty, groups=max(codes), codewords=words, transforms=made, notes=notes)


def fit_transform(
    model: nn.Module,
    windows: list[Inputs],
    settings: Settings,
    *,
    bits: float,
    target_gap: float | None,
    evaluate: Callable[[Codebook], dict[str, Any]] | None,
    progress: Progress,
) -> Codebook:
    """The codebook of a budget, or of the smallest that keeps `target_gap` of the gap.

    Args:
        evaluate: measures a codebook on windows held back, for its notes; None: there are none.
    """
    prepared = TransformFit(model, windows, settings, progress)

    def at(budget: float) -> Codebook:
        book = prepared.codebook(budget)
        if evaluate is not None:
            book.notes["held_back"] = evaluate(book)
        return book

    return at(bits) if target_gap is None else _smallest(at, target_gap)


def check_budget(
    bits: float | None, target_gap: float | None, codewords: int | None, rank: int, adapter: Adapter
) -> float:
    """The budget to begin with; refuses what no codes can be made of."""
    if target_gap is not None and bits is not None:
        raise ValueError("target_gap: expected in place of bits, got both")
    if target_gap is not None and not 0 < target_gap < 1:
        raise ValueError(f"target_gap: expected a share between 0 and 1, got {target_gap}")
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    bits = DEFAULT_BITS if bits is None else float(bits)
    code = ((codewords or default_codewords(bits)) - 1).bit_length()
    blocks = len(adapter.blocks)
    most = 32 * 2 * adapter.num_key_value_heads * adapter.head_dim
    if not code / blocks <= bits <= most:
        raise ValueError(
            f"bits: expected at least {code / blocks:.2g}, one code of {code} bits in one of "
            f"{blocks} blocks, and at most {most}, dense fp32, got {bits:g}"
        )
    return bits


def default_rank(adapter: Adapter) -> int:
    """Receivers pay for the predictor: it is to stay small beside the block's own work."""
    return min(64, max(1, adapter.hidden_size // 8))


def default_codewords(bits: float) -> int:
    """More codewords are better, and cost more to learn and to search; few bits have few groups."""
    return 256 if bits <= MANY_BITS else 64


def _smallest(at: Callable[[float], Codebook], target: float) -> Codebook:
    """The codebook of the smallest budget tried that keeps `target` of the gap."""
    tried: dict[float, Codebook] = {}

    def enough(bits: float) -> bool:
        tried[bits] = tried.get(bits) or at(bits)
        kept = tried[bits].notes["held_back"]["gap_recovered"]
        return bool(kept >= target)  # nan, where nothing is to be kept, is not enough

    bits = TARGET_FROM
    if enough(bits):
        while bits > TARGET_LEAST and enough(bits / 2):
            bits /= 2
    else:
        while bits < TARGET_MOST and not enough(bits):
            bits *= 2
        enough(bits)
    told = [
        {"bits": book.bits, "gap_recovered": book.notes["held_back"]["gap_recovered"]}
        for _, book in sorted(tried.items())
    ]
    tried[bits].notes.update(target_gap=target, tried=told)
    return tried[bits]


@dataclass(frozen=True)
class Settings:
    """Of a fit in space "transform", see `fit` for what they mean.

    Attributes:
        codewords: None: `default_codewords` of each budget.
    """

    prefix: int
    codewords: int | None
    rank: int
    iterations: int
    seed: int

    def words(self, bits: float) -> int:
        return self.codewords or default_codewords(bits)
