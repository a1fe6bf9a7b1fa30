"""Fitting codebooks: checks, k-means, and a first honest look at the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import astra_kernels as ak

from ..codes.codebook import FITTED, Codebook, check_groups, check_space, geometry
from ..evaluate import Measured, measure
from ..models import Adapter, Inputs, adapt
from ..parallel import map_cores
from .budgets import Settings, check_budget, default_codewords, default_rank, fit_transform
from .calibration import Progress, Recorded, as_windows, record
from .kmeans import kmeans


def fit(
    model: nn.Module,
    calibration: Tensor | Sequence[Tensor],
    *,
    space: str = "kv",
    groups: int = 1,
    codewords: int | None = None,
    bits: float | None = None,
    target_gap: float | None = None,
    extra: Sequence[Tensor] = (),
    prefix: int | None = None,
    rank: int | None = None,
    shared: bool | None = None,
    iterations: int = 8,
    seed: int = 0,
    held_back: int = 2,
    world_size: int = 4,
    progress: Progress = lambda what, done, steps: None,
) -> Codebook:
    """Learns the codewords of every block by k-means.

    Args:
        model: a supported Hugging Face model.
        calibration: token windows, int64 [W, T] or a list of [T] (with the class token, for BERT);
            or images, [W, C, h, w]. Never the text that is then prompted or evaluated.
        space: "kv" codes keys and values jointly, before rotation; "hidden" codes block inputs;
            "differential" codes what a block's input adds to the estimate of the block before;
            "transform" codes keys and values with all that is known of them (`transform.py`): the
            most accurate, and the only one that says itself how many bits each block is worth.
        groups: codes a token and block. Space "kv": a multiple of the KV heads, each coded on its
            own, or fewer, shared by all heads. Else channel groups (the paper's G).
        codewords: codewords of a group (the paper's K); None: 1024, in space "transform" 256 up to
            200 bits, above that 64.
        bits: space "transform", which has no `groups`: at most so many bits a token and block, on
            average over the blocks; None: 100.
        target_gap: space "transform": in place of `bits`, the share of what remote tokens are worth
            that is to be kept on the windows held back. Tries budgets that double, or halve, and
            takes the smallest that suffices; `notes["tried"]` has them all.
        extra: more windows to calibrate on, never held back: `sampled_windows` of the model.
        prefix: leading tokens of a decoder's input that every rank computes itself; None: 1 in
            space "transform", else 0.
        rank: space "transform", of its predictor; None: an eighth of the hidden size, at most 64.
        shared: one set of codes for all heads; None: where `groups` is no multiple of the KV heads.
        iterations: Lloyd iterations.
        seed: makes the result deterministic, whatever the number of threads.
        held_back: windows kept out of the fit, on which the result is evaluated as `world_size`
            ranks. `notes["held_back"]` of the codebook tells; with 0, nothing is evaluated.

    Raises:
        ValueError: nothing to calibrate on, more codewords than vectors, groups that the model
            cannot be cut into, activations that are not finite, a model without token ids in
            space "differential".
    """
    adapter = adapt(model)
    windows = as_windows(calibration)
    if model.training:
        raise ValueError("model: expected evaluation mode, got training: call model.eval()")
    transform = _check_space(space, adapter, bits, target_gap)
    prefix = _prefix(prefix, transform, adapter)
    given = codewords
    rank = default_rank(adapter) if rank is None else rank
    if transform:
        bits = check_budget(bits, target_gap, codewords, rank, adapter)
        codewords = codewords or default_codewords(bits)
    else:
        codewords = codewords or 1024
        shared = groups % adapter.num_key_value_heads != 0 if shared is None else shared
        shared = shared and space == "kv"
        check_groups(space, groups, shared, geometry(adapter))
    kept, tried = _hold_back(windows, held_back)
    kept += as_windows(extra) if len(extra) else []
    vectors = _check_counts(adapter, kept, tried, world_size, codewords)

    def evaluate(codebook: Codebook) -> dict[str, Any]:
        return _evaluate(model, codebook, tried, world_size, progress)

    if transform:
        if target_gap is not None and not tried:
            raise ValueError("target_gap: expected windows to hold back, on which it is measured")
        assert bits is not None
        return fit_transform(
            model,
            kept,
            Settings(prefix, given, rank, iterations, seed),
            bits=bits,
            target_gap=target_gap,
            evaluate=evaluate if tried else None,
            progress=progress,
        )
    recorded = record(adapter, space, kept, progress, prefix)
    of_blocks = _clustered(recorded, groups, bool(shared), codewords, iterations, seed)
    tables, scales = _by_block(of_blocks, len(adapter.blocks), progress)
    codebook = Codebook(
        space,
        groups,
        codewords,
        bool(shared),
        tables=tables,
        scales=scales if space == "kv" else None,
        prefix=prefix,
        geometry=geometry(adapter),
        model=adapter.digest(),
        notes={"calibration_vectors": vectors, "iterations": iterations, "seed": seed},
    )
    if tried:
        codebook.notes["held_back"] = evaluate(codebook)
    return codebook


def _check_space(
    space: str, adapter: Adapter, bits: float | None, target_gap: float | None
) -> bool:
    """Whether it is "transform", which alone has a budget."""
    if space not in FITTED:
        raise ValueError(
            f"space: expected {', '.join(map(repr, FITTED))}, which are fitted, got {space!r}"
        )
    check_space(space, adapter)
    if space != "transform" and (bits is not None or target_gap is not None):
        raise ValueError(
            f"bits, target_gap: expected with space 'transform' only, got space {space!r}"
        )
    return space == "transform"


def _check_counts(
    adapter: Adapter, kept: list[Inputs], tried: list[Inputs], world_size: int, codewords: int
) -> int:
    """The vectors to calibrate on: enough of them, and windows long enough to be evaluated."""
    shortest = min((adapter.count(window)[1] for window in tried), default=0)
    if tried and not 2 <= world_size < shortest:
        raise ValueError(
            f"world_size: expected at least 2 and less than the {shortest} tokens of a window held "
            f"back for the evaluation, got {world_size}"
        )
    vectors = sum(batch * tokens for batch, tokens in map(adapter.count, kept))
    if not 2 <= codewords <= min(vectors, 65536):
        raise ValueError(
            f"codewords: expected 2 to 65536 and at most the {vectors} calibration vectors, "
            f"got {codewords}; give more calibration windows"
        )
    return vectors


def _clustered(
    recorded: Recorded, groups: int, shared: bool, codewords: int, iterations: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tables and scales of each block in turn."""
    if recorded.space == "differential":
        return _closed_loop(recorded, groups, codewords, iterations, seed)

    def cluster(block: int) -> tuple[Tensor, Tensor]:
        found, scales = recorded.vectors(block, groups, shared)
        return kmeans(found, codewords, iterations=iterations, seed=seed + block), scales

    return map_cores(cluster, range(len(recorded.adapter.blocks)))


def _by_block(
    found: Iterator[tuple[Tensor, Tensor]], blocks: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Stacked, and told of as they come."""
    tables, scales = [], []
    progress("clustering", 0, blocks)
    for block, (table, scale) in enumerate(found):
        tables.append(table)
        scales.append(scale)
        progress("clustering", block + 1, blocks)
    return torch.stack(tables).cpu(), torch.stack(scales).cpu()


def _prefix(prefix: int | None, transform: bool, adapter: Adapter) -> int:
    if prefix is None:
        prefix = 1 if transform and adapter.causal else 0
    if prefix < 0 or (prefix and not adapter.causal):
        raise ValueError(
            f"prefix: expected 0 or more, and 0 for an encoder, whose first tokens see all others, "
            f"got {prefix}"
        )
    return prefix


def _closed_loop(
    recorded: Recorded, groups: int, codewords: int, iterations: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tables and scales of each block in turn: what is left to code depends on earlier tables."""

    def cluster(group: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Codewords [1, K, w] of a group of channels, and what they add to its estimates."""
        start, vectors = group
        table = kmeans(vectors, codewords, iterations=iterations, seed=start)
        return table, ak.decode(ak.encode(vectors, table), table)

    estimate, scales = recorded.vectors(0, groups, False)  # the embeddings: known everywhere
    yield estimate.new_zeros(groups, codewords, estimate.shape[-1]), scales
    for block in range(1, len(recorded.adapter.blocks)):
        found, scales = recorded.vectors(block, groups, False)
        missing = [part.contiguous() for part in (found - estimate).split(1, 1)]
        clustered = map_cores(cluster, enumerate(missing, seed + block * groups))
        tables, steps = zip(*clustered, strict=True)
        estimate += torch.cat(steps, 1)
        yield torch.cat(tables), scales


def _hold_back(windows: list[Inputs], held_back: int) -> tuple[list[Inputs], list[Inputs]]:
    """Splits evenly spaced windows off; at least half of all stay."""
    count = min(held_back, len(windows) // 2)
    out = {len(windows) * (2 * i + 1) // (2 * count) for i in range(count)}
    kept = [window for i, window in enumerate(windows) if i not in out]
    return kept, [windows[i] for i in sorted(out)]


def _evaluate(
    model: nn.Module, codebook: Codebook, windows: list[Inputs], ranks: int, progress: Progress
) -> dict[str, Any]:
    def step(done: int, steps: int) -> None:
        progress("evaluating", done, steps)

    found: Measured = measure(model, codebook, windows, world_size=ranks, progress=step)
    return {
        "windows": len(windows),
        "world_size": ranks,
        "metric": found.metric,
        "exact": found.exact,
        "astra": found.astra,
        "local_only": found.local_only,
        "gap_recovered": found.gap_recovered,
    }
