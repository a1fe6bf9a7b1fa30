"""What the codes cost in accuracy, beside both controls: exact exchange, and local-only."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes.codebook import Codebook
from .costs import default_halo
from .engine import Engine
from .models import Inputs, adapt, is_language_model
from .parallel import on_one_core
from .transport import Mesh, local_mesh

R = TypeVar("R")
# Of the metric: a smaller difference between two runs comes from rounding and from few windows.
LEAST_GAP = 1e-3


def run_ranks(world_size: int, work: Callable[[Mesh], R], timeout: float = 600.0) -> list[R]:
    """Runs `work` as every rank of a mesh of threads in this process; results by rank.

    The threads may share one model: N ranks are simulated without N copies of the weights. The
    error of the rank that failed first is raised.
    """
    meshes = local_mesh(world_size, timeout=timeout)
    results: dict[int, R] = {}
    errors: list[BaseException] = []

    def rank(mesh: Mesh) -> None:
        on_one_core()
        with contextlib.suppress(BaseException), mesh:
            try:
                results[mesh.rank] = work(mesh)
            except BaseException as error:
                errors.append(error)  # before the mesh closes, and peers miss this rank
                raise

    cores = torch.get_num_threads()
    threads = [threading.Thread(target=rank, args=(mesh,), daemon=True) for mesh in meshes]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(cores)
    if errors:
        raise errors[0]
    return [results[n] for n in range(world_size)]


@dataclass(frozen=True)
class Measured:
    """What one set of windows says of a codebook.

    Attributes:
        metric: "perplexity" over the tokens after the first shard, for language models; "error"
            for the others: squared error of the model's output over the output's variance.
        exact, astra, local_only: the metric on one device, with the codes, and without any remote
            tokens. Lower is better.
        bits_per_token_block: payload bits a token and block, each payload counted once.
        bits_per_receiver: those that one receiver gets of a token and block, on average.
        local_overlap: without remote tokens but for those that each rank computes itself, the
            codebook's prefix and the halo; None where there are none, or it was not measured.
    """

    metric: str
    exact: float
    astra: float
    local_only: float
    bits_per_token_block: float
    local_overlap: float | None = None
    bits_per_receiver: float = 0.0

    @property
    def gap_recovered(self) -> float:
        """The share of the gap between dropping remote tokens and exact exchange that the codes
        recover; below 0: they harm.

        nan where there is no gap beyond rounding: where remote tokens are worth less than
        `LEAST_GAP`.
        """
        if self.local_only - self.exact <= LEAST_GAP * (self.exact or 1.0):
            return math.nan
        if self.metric == "error":
            return 1 - self.astra / self.local_only
        return math.log(self.local_only / self.astra) / math.log(self.local_only / self.exact)


def shard_loss(engine: Engine, input_ids: Tensor) -> tuple[float, int]:
    """Summed loss (nats) and number of the next-token predictions of this rank's tokens.

    The first rank's tokens see no remote tokens and count nothing. Collective.
    """
    output = engine(input_ids=input_ids, logits="local")
    plan = engine.plan(input_ids.shape[1])
    shard = plan.shard(engine.rank)
    targets = input_ids[:, shard.start + 1 : shard.stop + 1]
    if engine.mesh.world_size > 1 and engine.rank == 0:
        return 0.0, 0
    predicted = output.logits[:, plan.copies :]  # the replicated tokens are every rank's
    return _loss(predicted[:, : targets.shape[1]], targets), targets.numel()


@torch.inference_mode()
def measure(
    model: nn.Module,
    codebook: Codebook,
    windows: Sequence[Inputs],
    *,
    world_size: int,
    halo: int | None = None,
    overlap: bool = True,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> Measured:
    """Compares `codebook` with both controls over `windows`; the ranks are threads.

    All use the same equal shards (with attention-sink tokens, to a token). Exact is dense exchange
    in fp32, which equals the single device to rounding. `halo` is of the engine, for `codebook`;
    None: its default for the shortest window. `overlap`: whether `local_overlap` is measured, too.
    `progress` is told of windows done and in all, over all methods.
    """
    language = is_language_model(model)
    shortest = _shortest(model, windows, world_size)
    if halo is None:
        halo = default_halo(adapt(model), codebook, shortest - codebook.prefix, world_size)
    overlaps = overlap and language and bool(codebook.prefix or halo)
    done, steps = itertools.count(1), (4 if overlaps else 3) * len(windows)

    def run(book: Codebook, halo: int = 0) -> tuple[list[list[Any]], tuple[float, float]]:
        def window_done() -> None:
            progress(next(done), steps)

        return _by_rank(model, book, windows, world_size, halo, window_done)

    exact, _ = run(Codebook.dense())
    astra, (bits, each) = run(codebook, halo)
    local_only, _ = run(Codebook.local_only())
    if not language:  # every rank has the whole output
        coded, alone = (_error(outputs[0], exact[0]) for outputs in (astra, local_only))
        return Measured("error", 0.0, coded, alone, bits, bits_per_receiver=each)
    computed = None
    if overlaps:
        overlapping, _ = run(replace(Codebook.local_only(), prefix=codebook.prefix), halo)
        computed = _perplexity(overlapping)
    of_exact, coded, alone = map(_perplexity, (exact, astra, local_only))
    return Measured("perplexity", of_exact, coded, alone, bits, computed, each)


def _shortest(model: nn.Module, windows: Sequence[Inputs], world_size: int) -> int:
    """Tokens of the shortest window; refuses windows that so many ranks cannot share."""
    if world_size < 2:
        raise ValueError(
            f"world_size: expected at least 2, so that there are remote tokens, got {world_size}"
        )
    if not windows:
        raise ValueError("windows: expected at least one, got none")
    for window in windows:
        if not isinstance(window, Mapping):
            raise TypeError(
                f"windows: expected the inputs of a call each, by name, got {type(window).__name__}"
            )
    if any(not bool(w["attention_mask"].all()) for w in windows if "attention_mask" in w):
        raise ValueError("windows: expected no padding, which would be counted, got some")
    shortest = min(adapt(model).count(window)[1] for window in windows)
    if shortest <= world_size:
        raise ValueError(
            f"windows: expected more than {world_size} tokens in each, one a rank and one to "
            f"predict, got {shortest}"
        )
    return shortest


def _by_rank(
    model: nn.Module,
    book: Codebook,
    windows: Sequence[Inputs],
    world_size: int,
    halo: int,
    window_done: Callable[[], None],
) -> tuple[list[list[Any]], tuple[float, float]]:
    """By rank and window: (loss, count) of a language model, else the output; and the bits of a
    token and block, by payload and by receiver. `window_done` is called after every window."""
    language = is_language_model(model)

    def work(mesh: Mesh) -> tuple[list[Any], tuple[float, float]]:
        measured: list[Any] = []
        equal = (1.0,) * world_size
        with Engine(model, book, mesh, weights=equal, halo=halo) as engine:
            for window in windows:
                if language:
                    measured.append(shard_loss(engine, window["input_ids"]))
                else:
                    measured.append(answer_of(engine(**window, logits="all")).float())
                if engine.rank == 0:
                    window_done()
            return measured, (engine.bits_per_token_block, engine.bits_per_receiver)

    ranks = run_ranks(world_size, work)
    return [measured for measured, _ in ranks], ranks[0][1]


def answer_of(output: Any) -> Tensor:
    """What a model is for: its logits, those of an answer's first and last token, [B, 2, T], or its
    final hidden states."""
    answer: Tensor
    if "start_logits" in output:
        answer = torch.stack([output.start_logits, output.end_logits], 1)
    else:
        answer = output.logits if "logits" in output else output.last_hidden_state
    return answer


def _loss(logits: Tensor, targets: Tensor) -> float:
    flat = logits.float().flatten(0, 1)
    return float(F.cross_entropy(flat, targets.flatten(), reduction="sum"))


def _perplexity(runs: list[list[tuple[float, int]]]) -> float:
    pairs = [pair for rank in runs for pair in rank]
    return math.exp(sum(loss for loss, _ in pairs) / sum(count for _, count in pairs))


def _error(outputs: list[Tensor], exact: list[Tensor]) -> float:
    """Squared error over the variance of the exact outputs."""
    pairs = list(zip(outputs, exact, strict=True))
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    spread = sum(float((b - b.mean()).square().sum()) for _, b in pairs)
    if not spread:  # one number a window: that of all windows, or their size
        all_of = torch.cat([b.flatten() for b in exact])
        spread = float((all_of - all_of.mean()).square().sum()) or float(all_of.square().sum())
    return error / spread if spread else math.nan
