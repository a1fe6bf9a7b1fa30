"""Perplexity of SmolLM2 as N ranks, in one simulated pass, beside both controls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.models import adapt
from astra_runtime.parallel import map_cores
from astra_runtime.plan import Plan
from astra_runtime.train.simulate import AfterLoss, Simulation
from bench import codebooks
from bench.accuracy import calibrate

TOKENS = calibrate.TOKENS
Losses = list[float]  # nats a token after the first shard, by window
Simulate = Callable[[int, dict[str, Tensor]], Simulation]


def equal_shards(book: Codebook, world_size: int, halo: int) -> Plan:
    """Equal shards of a window behind the codebook's prefix, which every rank computes."""
    return Plan.make(TOKENS - book.prefix, world_size, causal=True, copies=book.prefix, halo=halo)


def window_losses(
    model: Any, windows: Sequence[Tensor], world_size: int, simulate: Simulate
) -> Losses:
    """Nats a token after the first shard of each window, int64 [1024].

    Args:
        simulate: makes the pass of a window, from its number and the model's inputs.
    """
    first = TOKENS // world_size

    @torch.inference_mode()
    def loss(numbered: tuple[int, Tensor]) -> float:
        number, ids = numbered
        logits = simulate(number, {"input_ids": ids[None]}).run().logits[0]
        return float(F.cross_entropy(logits[first:-1], ids[first + 1 :]))

    with adapt(model).installed():
        return list(map_cores(loss, list(enumerate(windows))))


def losses(
    model: Any,
    book: Codebook,
    windows: Sequence[Tensor],
    *,
    world_size: int,
    halo: int = 0,
    lost: float = 0.0,
    seed: int = 0,
    quantizers: Any = None,
    after_loss: AfterLoss | None = None,
) -> Losses:
    """`window_losses` of a codebook. The same frames are lost with the same seed, whatever codes.

    Args:
        lost: the share of frames that do not arrive.
        quantizers, after_loss: as for `Simulation`.
    """
    plan = equal_shards(book, world_size, halo)

    def simulate(number: int, inputs: dict[str, Tensor]) -> Simulation:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        return Simulation(
            model,
            book,
            plan,
            inputs,
            quantizers,
            lost=lost,
            generator=generator,
            after_loss=after_loss,
        )

    return window_losses(model, windows, world_size, simulate)


def control_losses(model: Any, windows: Sequence[Tensor], world_size: int) -> dict[str, Losses]:
    """Of "exact" and "local_only"."""
    return {
        name: losses(model, book, windows, world_size=world_size)
        for name, book in codebooks.CONTROLS.items()
    }


def figures(
    model: Any, book: Codebook, ours: Losses, controls: dict[str, Losses]
) -> dict[str, Any]:
    """Perplexities and the share of the gap recovered, over all windows and between them."""
    exact, local_only = (statistics.fmean(controls[name]) for name in codebooks.CONTROLS)
    loss = statistics.fmean(ours)
    by_window = [
        (without - coded) / (without - best)
        for coded, best, without in zip(
            ours, controls["exact"], controls["local_only"], strict=True
        )
    ]
    return {
        "perplexity": math.exp(loss),
        "exact": math.exp(exact),
        "local_only": math.exp(local_only),
        "gap_recovered": (local_only - loss) / (local_only - exact),
        "gap_spread": statistics.stdev(by_window) if len(by_window) > 1 else None,
        "bits_per_token_block": codebooks.bits_per_token_block(book, adapt(model)),
        "losses": rounded(ours),
    }


def rounded(values: Losses) -> Losses:
    """As they stand in a result."""
    return [round(value, 5) for value in values]


def codebook_of(name: str, seed: int, model: Any, tokenizer: Any) -> Codebook:
    """The codebook of a name: a control, one of `bench.accuracy.calibrate`, or fitted now."""
    book = codebooks.CONTROLS.get(name) or codebooks.control(name)
    if book is not None:
        return book
    if codebooks.budgeted(name):
        return codebooks.calibrated(name, seed)
    windows = calibrate.windows(tokenizer, calibrate.TEXT, seed)
    return Codebook.fit(model, windows, **codebooks.size_of(name), held_back=0, seed=seed)


def kept_codebook_of(name: str, model: Any, tokenizer: Any) -> Codebook:
    """The same of seed 0; what has to be fitted is fitted once, and kept beside the others."""
    folder: Path = codebooks.FOLDER / f"{name.replace(':', '-')}-0"
    if folder.is_dir():
        return Codebook.from_pretrained(folder)
    book = codebook_of(name, 0, model, tokenizer)
    if not codebooks.budgeted(name):
        book.save_pretrained(folder)
    return book
