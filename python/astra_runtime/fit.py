"""Fitting codebooks: calibration, k-means, and a first honest look at the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import astra_kernels as ak

from .codebook import FITTED, Codebook, check_groups, check_space, geometry, joint
from .evaluate import Inputs, Measured, measure
from .fit_transform import Cost, Rows, allocate, embedding_of, fit_blocks, sensitivity
from .kmeans import kmeans
from .models import Adapter, adapt, listening
from .parallel import map_cores
from .spaces import Rope, unrotate
from .transform import Transform, flat

SENSITIVITY_WINDOWS = 8  # a backward pass each; F needs no more
DEFAULT_BITS = 100.0
TARGET_FROM, TARGET_LEAST, TARGET_MOST = 40.0, 5.0, 1280.0  # budgets tried for a target

Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all


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
    rank: int = 64,
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
        codewords: codewords of a group (the paper's K); None: 256 in space "transform", else 1024.
        bits: space "transform", which has no `groups`: at most so many bits a token and block, on
            average over the blocks; None: 100.
        target_gap: space "transform": in place of `bits`, the share of what remote tokens are worth
            that is to be kept on the windows held back. Tries budgets that double, or halve, and
            takes the smallest that suffices; `notes["tried"]` has them all.
        extra: more windows to calibrate on, never held back: `sampled_windows` of the model.
        prefix: leading tokens of a decoder's input that every rank computes itself; None: 1 in
            space "transform", else 0.
        rank: space "transform", of its predictor.
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
    if space not in FITTED:
        raise ValueError(
            f"space: expected {', '.join(map(repr, FITTED))}, which are fitted, got {space!r}"
        )
    check_space(space, adapter)
    transform = space == "transform"
    codewords = codewords or (256 if transform else 1024)
    prefix = _prefix(prefix, transform, adapter)
    if transform:
        if target_gap is not None:
            _check_target(target_gap, bits, held_back, windows)
        bits = DEFAULT_BITS if bits is None else float(bits)
        _check_bits(bits, codewords, adapter)
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
    elif bits is not None or target_gap is not None:
        raise ValueError(
            f"bits, target_gap: expected with space 'transform' only, got space {space!r}"
        )
    if shared is None:
        shared = groups % adapter.num_key_value_heads != 0
    shared = shared and space == "kv"
    if not transform:
        check_groups(space, groups, shared, geometry(adapter))
    kept, tried = _hold_back(windows, held_back)
    kept += as_windows(extra) if len(extra) else []
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
    notes: dict[str, Any] = {"calibration_vectors": vectors, "iterations": iterations, "seed": seed}
    common: dict[str, Any] = {
        "prefix": prefix,
        "geometry": geometry(adapter),
        "model": adapter.digest(),
        "notes": notes,
    }
    if transform:
        assert bits is not None
        settings = _Settings(prefix, codewords, rank, iterations, seed)
        prepared = _prepare(model, kept, settings, progress)

        def at(budget: float) -> Codebook:
            made = _transforms(prepared, budget, settings, progress)
            told = {**notes, "bits": budget, "rank": rank, "codes": [t.codes for t in made]}
            most = max(t.codes for t in made)
            book = Codebook(space, most, codewords, transforms=made, **common | {"notes": told})
            if tried:
                told["held_back"] = _evaluate(model, book, tried, world_size, progress)
            return book

        return at(bits) if target_gap is None else _smallest(at, target_gap)
    recorded = _record(adapter, space, kept, progress, prefix)

    def cluster(block: int) -> tuple[Tensor, Tensor]:
        found, scales = recorded.vectors(block, groups, shared)
        return kmeans(found, codewords, iterations=iterations, seed=seed + block), scales

    blocks, tables, scales = len(adapter.blocks), [], []
    if space == "differential":
        found = _closed_loop(recorded, groups, codewords, iterations, seed)
    else:
        found = map_cores(cluster, range(blocks))
    progress("clustering", 0, blocks)
    for block, (table, scale) in enumerate(found):
        tables.append(table)
        scales.append(scale)
        progress("clustering", block + 1, blocks)
    codebook = Codebook(
        space,
        groups,
        codewords,
        shared,
        tables=torch.stack(tables).cpu(),
        scales=torch.stack(scales).cpu() if space == "kv" else None,
        **common,
    )
    if tried:
        notes["held_back"] = _evaluate(model, codebook, tried, world_size, progress)
    return codebook


def _prefix(prefix: int | None, transform: bool, adapter: Adapter) -> int:
    if prefix is None:
        prefix = 1 if transform and adapter.causal else 0
    if prefix < 0 or (prefix and not adapter.causal):
        raise ValueError(
            f"prefix: expected 0 or more, and 0 for an encoder, whose first tokens see all others, "
            f"got {prefix}"
        )
    return prefix


def _check_bits(bits: float, codewords: int, adapter: Adapter) -> None:
    blocks, code = len(adapter.blocks), (codewords - 1).bit_length()
    most = 32 * 2 * adapter.num_key_value_heads * adapter.head_dim
    if not code / blocks <= bits <= most:
        raise ValueError(
            f"bits: expected at least {code / blocks:.2g}, one code of {code} bits in one of "
            f"{blocks} blocks, and at most {most}, dense fp32, got {bits:g}"
        )


def _check_target(target: float, bits: float | None, held_back: int, windows: list[Inputs]) -> None:
    if bits is not None:
        raise ValueError("target_gap: expected in place of bits, got both")
    if not 0 < target < 1:
        raise ValueError(f"target_gap: expected a share between 0 and 1, got {target}")
    if not held_back or len(windows) < 2:
        raise ValueError("target_gap: expected windows to hold back, on which it is measured")


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
class _Settings:
    """Of space "transform", see `fit`."""

    prefix: int
    codewords: int
    rank: int
    iterations: int
    seed: int


def _prepare(
    model: nn.Module, windows: list[Inputs], settings: _Settings, progress: Progress
) -> tuple[Rows, Cost]:
    """What every budget's fit needs: sensitivity on a few windows, and the record of all."""
    adapter, prefix, seed = adapt(model), settings.prefix, settings.seed
    few = windows[:: max(1, len(windows) // SENSITIVITY_WINDOWS)][:SENSITIVITY_WINDOWS]
    progress("weighing", 0, 1)
    fisher = sensitivity(model, few, prefix=prefix, world_size=4, seed=seed)
    progress("weighing", 1, 1)
    recorded = _record(adapter, "kv", windows, progress, prefix)
    copies, embedding = adapter.class_tokens + prefix, None
    if adapter.token_ids:
        found = [embedding_of(adapter, window)[:, copies:].flatten(0, 1) for window in windows]
        embedding = torch.cat(found)
    pairs = [recorded.pairs(block) for block in range(len(adapter.blocks))]
    return Rows(pairs, embedding), Cost.of(fisher.to(adapter.device))


def _transforms(
    prepared: tuple[Rows, Cost], bits: float, settings: _Settings, progress: Progress
) -> tuple[Transform, ...]:
    """The code of every block within a budget."""
    rows, cost = prepared
    blocks = len(rows.blocks)
    with torch.no_grad():  # not inference mode: the tensors made here may be trained with
        counts = allocate(rows, cost, bits, (settings.codewords - 1).bit_length())
        return fit_blocks(
            rows,
            cost,
            counts,
            codewords=settings.codewords,
            rank=settings.rank,
            iterations=settings.iterations,
            seed=settings.seed,
            progress=lambda block: progress("clustering", block + 1, blocks),
        )


def _closed_loop(
    recorded: _Recorded, groups: int, codewords: int, iterations: int, seed: int
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


def as_windows(calibration: Tensor | Sequence[Tensor]) -> list[Inputs]:
    """Calibration data as the inputs of one forward pass each."""
    windows = list(calibration)
    if not windows:
        raise ValueError("calibration: expected at least one window, got none")
    if windows[0].is_floating_point():
        return [{"pixel_values": window[None]} for window in windows]
    return [{"input_ids": window[None]} for window in windows]


def _hold_back(windows: list[Inputs], held_back: int) -> tuple[list[Inputs], list[Inputs]]:
    """Splits evenly spaced windows off; at least half of all stay."""
    count = min(held_back, len(windows) // 2)
    out = {len(windows) * (2 * i + 1) // (2 * count) for i in range(count)}
    kept = [window for i, window in enumerate(windows) if i not in out]
    return kept, [windows[i] for i in sorted(out)]


def _evaluate(
    model: nn.Module, codebook: Codebook, windows: list[Inputs], ranks: int, progress: Progress
) -> dict[str, Any]:
    steps, done = 3 * len(windows), 0

    def step() -> None:
        nonlocal done
        done += 1
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


def _record(
    adapter: Adapter, space: str, windows: list[Inputs], progress: Progress, prefix: int = 0
) -> _Recorded:
    """Runs the model by itself on every window, keeping what the space codes."""

    def run(window: Inputs) -> list[Any]:
        recorder = _Recorder(adapter, space, window, prefix)
        with torch.inference_mode(), listening(recorder):
            adapter.model(**window)
        return recorder.kept

    progress("calibrating", 0, len(windows))
    kept: list[list[Any]] = []
    with adapter.installed():
        for of_window in map_cores(run, windows):
            kept.append(of_window)
            progress("calibrating", len(kept), len(windows))
    return _Recorded(adapter, space, kept)


class _Recorder:
    """A listener of one window: the block inputs, or the keys (not rotated) and values."""

    def __init__(self, adapter: Adapter, space: str, window: Inputs, prefix: int) -> None:
        self.copies, self.space = adapter.class_tokens + prefix, space
        positions = adapter.positions(window)
        self.rope: Rope = None if positions is None else adapter.rope(positions)
        self.kept: list[Any] = [None] * len(adapter.blocks)

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden

    def before_block(self, block: int, hidden: Tensor) -> None:
        if self.space != "kv":
            self.kept[block] = hidden[:, self.copies :].float()

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        if self.space == "kv":
            plain = unrotate(key.float(), self.rope)
            self.kept[block] = (plain[:, :, self.copies :], value[:, :, self.copies :].float())

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden[:, :1]  # the head's work is not needed


@dataclass
class _Recorded:
    """What was kept, by window and block. A block's part is freed when it is taken."""

    adapter: Adapter
    space: str
    kept: list[list[Any]]

    def pairs(self, block: int) -> Tensor:
        """Keys and values of a block, side by side as `transform.flat` puts them: [n, E]."""
        kept = [of_window[block] for of_window in self.kept]
        for of_window in self.kept:
            of_window[block] = None
        found = torch.cat([flat(key, value).flatten(0, 1) for key, value in kept])
        _finite(found, block)
        return found

    def vectors(self, block: int, groups: int, shared: bool) -> tuple[Tensor, Tensor]:
        """The vectors [n, C, w] of a block, and the scales [Hkv, 2] they were multiplied with."""
        kept = [of_window[block] for of_window in self.kept]
        for of_window in self.kept:
            of_window[block] = None
        scales = torch.ones(self.adapter.num_key_value_heads, 2, device=self.adapter.device)
        if self.space != "kv":
            found = torch.cat([h.flatten(0, 1) for h in kept]).unflatten(-1, (groups, -1))
        else:
            key = torch.cat([k for k, _ in kept], 2)
            value = torch.cat([v for _, v in kept], 2)
            scales = balance(key, value)
            found = joint(key, value, scales, groups, shared).flatten(0, 1)
        _finite(found, block)
        return found.contiguous(), scales


def _finite(found: Tensor, block: int) -> None:
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"model: activations of block {block} are not finite on the calibration data"
        )


def balance(key: Tensor, value: Tensor) -> Tensor:
    """Scales [Hkv, 2] that give a head's keys and values the same total variance."""

    def deviation(tensor: Tensor) -> Tensor:
        flat = tensor.transpose(0, 1).flatten(1, 2)  # [Hkv, n, d]
        return (flat - flat.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt()

    return 1 / torch.stack([deviation(key), deviation(value)], -1).clamp(min=1e-6)
