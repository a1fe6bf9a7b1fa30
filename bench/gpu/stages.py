"""What one rank's device does, by stage and by block, and what a link adds to N of them."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from astra_runtime import Codebook, Engine
from astra_runtime.models import adapt
from astra_runtime.trace import Trace, stage, trace_of, tracing
from astra_runtime.transport import Link
from bench.gpu.ranks import Replaying
from bench.report import Times, percentiles


@contextmanager
def model_stages(model: nn.Module) -> Iterator[None]:
    """Stages for the model's own work: the projections and the MLP of every block."""
    adapter, spans = adapt(model), {}

    def begin(name: str, block: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            spans[module] = stage(name, block)
            spans[module].__enter__()

        return hook

    def end(module: nn.Module, args: Any, output: Any) -> None:
        spans.pop(module).__exit__(None, None, None)

    with ExitStack() as stack:
        for index, block in enumerate(adapter.blocks):
            attention: Any = block.self_attn
            projections = [getattr(attention, f"{name}_proj") for name in "qkvo"]
            for module in (*projections, block.mlp):
                name = "mlp" if module is block.mlp else "project"
                for handle in (
                    module.register_forward_pre_hook(begin(name, index)),
                    module.register_forward_hook(end),
                ):
                    stack.callback(handle.remove)
        yield


def stages_of(trace: Trace, blocks: int) -> dict[str, list[float]]:
    """Milliseconds of each stage in each block; the first of a block's two "attend" is near."""
    times: dict[str, list[float]] = defaultdict(lambda: [0.0] * blocks)
    for name, block, start, stop in sorted(trace.spans, key=lambda span: span[2]):
        if block < 0:
            continue
        if name == "attend":
            name = "attend_far" if times["attend_near"][block] else "attend_near"
        times[name][block] += (stop - start) / 1e6
    # encoding holds packing
    if "pack" in times:
        pairs = zip(times["encode"], times["pack"], strict=True)
        times["encode"] = [both - pack for both, pack in pairs]
    return dict(times)


class Stopwatch:
    """Milliseconds of calls on a device, from the first kernel's begin to the last one's end."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def time(self, call: Callable[[], object]) -> Times:
        call()
        return percentiles([self._once(call) for _ in range(self.repeats)])

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in "12")
        torch.cuda.synchronize(self.device)
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


@dataclass
class Rank:
    """One rank alone: its whole call, and milliseconds of each stage in each block."""

    ms: Times
    stages: dict[str, list[float]]
    sent: dict[int, int]  # payload bytes of each block, to all receivers
    tokens: int

    def of(self, *names: str) -> float:
        """Milliseconds of these stages in all blocks."""
        return sum(sum(self.stages.get(name, ())) for name in names)


def run_rank(
    model: nn.Module, codebook: Codebook, ids: torch.Tensor, mesh: Replaying, watch: Stopwatch
) -> Rank:
    blocks = len(adapt(model).blocks)
    traces = []
    with Engine(model, codebook, mesh) as engine:

        def call() -> object:
            return engine(input_ids=ids)

        ms = watch.time(call)
        with model_stages(model):
            for _ in range(max(2, watch.repeats // 2)):
                trace = trace_of(watch.device)
                with tracing(trace):
                    call()
                traces.append(stages_of(trace, blocks))
        tokens = engine.plan(ids.shape[1]).size(mesh.rank)
    none = [0.0] * blocks
    stages = {
        name: [statistics.median(t.get(name, none)[b] for t in traces) for b in range(blocks)]
        for name in sorted(set().union(*traces))
    }
    sent = {block: size for block, size in mesh.sent.items() if block < blocks}
    return Rank(ms, stages, sent, tokens)


# The link model.


HIDDEN = ("attend_near",)  # what is computed while codes are on their way
EXCHANGED = ("wait", "send")  # the exchange itself, which the model has a time of its own for


def linked(ranks: Sequence[Rank], mbit_per_s: float, delay_ms: float) -> float:
    """Milliseconds of a call by ranks that work at once, each on a full-duplex link of that rate.

    In each block every rank computes up to its codes, all codes cross, and local attention hides
    what it can of that. The slowest rank sets the pace of each part; a frame for each receiver
    leaves through the sender's own link.
    """
    link = Link(mbit_per_s, delay_ms)
    blocks = len(next(iter(ranks[0].stages.values())))
    total = 0.0
    for block in range(blocks):
        crossing = max(1e3 * link.seconds(rank.sent.get(block, 0)) for rank in ranks)
        if crossing:
            crossing += delay_ms
        near = max(one_block(rank, block, HIDDEN) for rank in ranks)
        total += max(crossing, near)
    # the rest of the slowest rank's call, wherever it lies
    rest = max(rank.ms.p50 - rank.of(*HIDDEN, *EXCHANGED) for rank in ranks)
    return total + rest


def one_block(rank: Rank, block: int, names: Sequence[str]) -> float:
    return sum(rank.stages[name][block] for name in names if name in rank.stages)
