"""What bends the curve: the first token on 1 to 32 ranks, and from 1k to 8k tokens.

    python -m bench.latency.curve --model vit-base                 # also smollm2, smollm2-int8
    python -m bench.latency.curve --lengths                        # SmolLM2, 1k to 8k tokens

On the virtual clock, as `bench.latency`, but for ASTRA alone, with TLS records counted, and on one
core that all ranks have in turn. Writes latency_curve_<model>.json, or latency_lengths_<model>.json
with the most memory that each rank had at the greatest length, as processes of their own.

The pace of a virtual machine drifts by a third within minutes, so before and after whatever is
timed the same work is timed, `Pace`, and times are those at the run's median pace;
`speedup_as_timed` is without that, and `pace_ms` says how far it drifted.

`single` is this engine on one device, `torch` the model's own pass; the ideal, `floor_ms`, is the
faster one's time over N. `bound_ms` is what the linear layers allow, whose products of few rows are
slower a row: their measured time for T/N rows, and all else of the single device over N.

`stages_ms` are those of the rank that has the answer, and add up to its time: "prepare" is what a
call takes outside of the model's pass, "sockets" what system calls cost, "wait" what is left of
links and slower ranks. `busy_ms` has every rank's
computing. `uplink_ms` is how long the busiest uplink sends, `downlink_ms` how long the busiest
downlink receives, `uplink_headers_ms` what of the former is not payload: a frame's header, TLS,
TCP, IP and Ethernet.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from astra_runtime import Codebook
from astra_runtime.console import say
from astra_runtime.cores import peak_bytes
from astra_runtime.costs import engine_plan, flops_over_ideal
from astra_runtime.deploy import predict
from astra_runtime.deploy.rates import measure_rates
from astra_runtime.models import Adapter, adapt
from astra_runtime.models.quantized import weight_bytes
from astra_runtime.plan import Plan
from astra_runtime.steady import keep_memory
from astra_runtime.transport import Link as PacedLink
from astra_runtime.wire import HEADER_SIZE
from bench.baselines import methods
from bench.latency.processes import RankSettings, outputs, rank_of
from bench.latency.record import Recording, astra, baseline
from bench.latency.subjects import MODELS, SETTINGS, Subject
from bench.link.model import Link
from bench.link.virtual import Lap, SocketCosts, World
from bench.report import Case, command_line, percentiles, quiet_transformers, write

MODULE = "bench.latency.curve"
RANKS, LENGTHS = (2, 4, 8, 16, 32), (1024, 2048, 4096, 8192)
FEW_RANKS = (2, 4)  # for every length
SLOW = 5.0  # processor seconds: what takes longer is measured once
TORCH_TOKENS = 1024  # the model's own pass is measured up to this length
IN_TURNS = 8  # ranks at most
MOST_ROWS = 2048  # of a product that is measured: more take as long a row
PACE_ROWS = 256  # of the products that tell the machine's pace
Setting = tuple[str, int]  # codes and ranks
T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--codes", nargs="+", help="as bench.latency's settings; memory: the first")
    parser.add_argument("--pack-weights", action="store_true", help="on one device and on all")
    parser.add_argument(
        "--shares",
        choices=("planned", "engine"),
        default="planned",
        help="as `astra plan` recommends them for the link and this machine, or the engine's own "
        "(--lengths: these)",
    )
    parser.add_argument("--lengths", action="store_true", help="several lengths, on few ranks")
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--rtt-ms", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, help="default: 3, of several lengths 2")
    parser.add_argument("--name", help="of the result")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quiet_transformers()
    if options.rank:
        print(json.dumps(memory_of_rank(RankSettings(**json.loads(options.rank)))))
        return
    options.ranks = options.ranks or list(FEW_RANKS if options.lengths else RANKS)
    options.tokens = options.tokens or list(LENGTHS if options.lengths else LENGTHS[:1])
    options.repeats = options.repeats or (2 if options.lengths else 3)
    options.codes = options.codes or [usual_codes(options.model)]
    extra: dict[str, Any] = {"repeats": options.repeats}
    if options.lengths:
        extra["memory"] = memory(options)
    torch.set_num_threads(1)
    keep_memory()  # as the commands do
    costs = SocketCosts.measured()
    link = Link(options.mbit, rtt_ms=options.rtt_ms, tls=True)
    paces: list[float] = []
    cases = [
        case for tokens in options.tokens for case in cases_of(options, tokens, link, costs, paces)
    ]
    path = write(
        options.name or f"latency_{'lengths' if options.lengths else 'curve'}_{options.model}",
        cases,
        command=command_line(MODULE, arguments),
        packages=("torch", "numpy", "transformers"),
        link={"emulator": "virtual clock", **asdict(link)},
        extra=extra
        | {
            "socket_costs": costs._asdict(),
            "pace_ms": asdict(percentiles([1e3 * p for p in paces])),
        },
    )
    say(f"wrote {path}")


def usual_codes(model: str) -> str:
    """What the commands use for a language model, and for the others the first setting."""
    return "default" if model.startswith("smollm2") else SETTINGS[model][0]


class Pace:
    """How fast the machine is: `once` says how long the same work takes now.

    It does so before and after whatever is timed with `of`; `usual(n)` is by how much the n-th of
    those times is to be multiplied to be one at the median pace.
    """

    def __init__(self, once: Callable[[], float]) -> None:
        self.once, self.seconds = once, [once()]
        self.around: list[float] = []  # of each time taken: the mean of before and after

    def of(self, work: Callable[[], T]) -> tuple[T, int]:
        """What `work` gives, and its number."""
        found = work()
        self.seconds.append(self.once())
        self.around.append(statistics.fmean(self.seconds[-2:]))
        return found, len(self.around) - 1

    def usual(self, number: int) -> float:
        return statistics.median(self.seconds) / self.around[number]


class Times(NamedTuple):
    """Processor seconds of what one core does alone, by name, and recorded passes, by codes and
    number of ranks; both as they were timed and at the usual pace."""

    alone: dict[str, list[float]]
    passes: dict[Setting, list[Recording]]

    def single(self) -> float:
        """Of one device: of this engine or the model's own pass, whichever is faster."""
        both = (self.alone[name] for name in ("single", "torch") if name in self.alone)
        return min(map(statistics.median, both))


def cases_of(
    options: argparse.Namespace, tokens: int, link: Link, costs: SocketCosts, paces: list[float]
) -> list[Case]:
    """The cases of one length; appends the machine's paces meanwhile."""
    subject = Subject.make(options.model, tokens)
    adapter = adapt(subject.model)
    if options.pack_weights:
        adapter.hooks.pack()  # once for all passes of this model
    books = {codes: subject.codebook(codes) for codes in options.codes}
    pace = Pace(partial(on_one_core, partial(products, adapter, PACE_ROWS)))
    plans = planned(subject, books, adapter, options)
    timed, usual = measured(subject, books, adapter, pace, options, plans)
    paces += pace.seconds
    single = usual.single()
    whole = statistics.median(usual.alone["products 1"])
    cases = []
    for codes, ranks in usual.passes:
        book, of_ranks = books[codes], usual.passes[codes, ranks]
        of_rows = statistics.median(usual.alone[f"products {ranks}"])
        bound = of_rows + (single - whole) / ranks
        # playing a pass of many ranks takes seconds, so each is played once
        passes = [Played.of(recording, link, costs) for recording in of_ranks]
        times = percentiles([1e3 * each.finish for each in passes])
        number = sorted(range(len(passes)), key=lambda n: passes[n].finish)[(len(passes) - 1) // 2]
        middle = passes[number]
        as_timed = Played.of(timed.passes[codes, ranks][number], link, costs).finish
        peers = {name: usual.alone[name] for name in ("single", "torch") if name in usual.alone}
        case = Case(
            name=f"curve_{options.model}_{tokens}_{ranks}ranks",
            shape={
                "model": options.model,
                "tokens": tokens,
                "world_size": ranks,
                "mbit_per_s": link.mbit_per_s,
                "rtt_ms": link.rtt_ms,
                "space": book.space,
            },
            dtype=adapter.form(),
            impl=f"astra {codes}",
            ms=times,
            floor_ms=1e3 * single / ranks,
            peers={name: 1e3 * statistics.median(seconds) for name, seconds in peers.items()},
            extra={
                "packed_bytes": adapter.hooks.packed_bytes,
                "speedup": 1e3 * single / times.p50,
                "speedup_as_timed": timed.single() / as_timed,
                "bound_ms": 1e3 * bound,
                "bound_speedup": single / bound,
                "products_speedup": whole / of_rows,
                "shards": [plans[codes, ranks].size(n) for n in range(ranks)],
                "flop_bound": ranks
                / flops_over_ideal(adapter, book, subject.tokens, ranks, plans[codes, ranks]),
                **middle.figures(link),
            },
        )
        say(f"  {case.name}: {case.extra['speedup']:.2f}x, bound {case.extra['bound_speedup']:.2f}")
        cases.append(case)
    return cases


def planned(
    subject: Subject, books: Mapping[str, Codebook], adapter: Adapter, options: argparse.Namespace
) -> dict[Setting, Plan]:
    """How the tokens are cut. Measures this machine where that depends on it."""
    link = PacedLink(options.mbit, options.rtt_ms / 2)
    plans = {}
    for codes, book in books.items():
        by_link = options.shares == "planned" and adapter.causal and not options.lengths
        rates = measure_rates(subject.model, book, subject.tokens) if by_link else None
        for ranks in options.ranks:
            if rates is None:
                plan = engine_plan(adapter, book, subject.tokens, ranks)
            else:
                every = [rates] * ranks
                plan, _ = predict.quickest_plan(adapter, book, every, link, subject.tokens)
            plans[codes, ranks] = plan
    return plans


def measured(
    subject: Subject,
    books: Mapping[str, Codebook],
    adapter: Adapter,
    pace: Pace,
    options: argparse.Namespace,
    plans: Mapping[Setting, Plan],
) -> tuple[Times, Times]:
    """As timed, and at the usual pace: single devices, the products alone, and all ranks' passes.

    All in turns, but for many ranks, whose engines take longer to make than to run.
    """
    dense = Codebook.dense()
    alone: dict[str, Callable[[], float]] = {
        "single": lambda: astra(subject, dense, 1, 1)[0].computing[0]
    }
    if subject.tokens <= TORCH_TOKENS:
        own = methods()["single"]
        alone["torch"] = lambda: baseline(subject, own, 1, 1)[0].computing[0]
    for ranks in (1, *options.ranks):
        rows = adapter.class_tokens + math.ceil(subject.tokens / ranks)
        alone[f"products {ranks}"] = partial(on_one_core, partial(products, adapter, rows))
    passes: dict[Setting, Callable[[int], list[Recording]]] = {
        (codes, ranks): partial(
            astra,
            subject,
            book,
            ranks,
            shard_weights=[plans[codes, ranks].size(n) for n in range(ranks)],
        )
        for codes, book in books.items()
        for ranks in options.ranks
    }
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in alone}
    recorded: dict[Setting, list[tuple[Recording, int]]] = {setting: [] for setting in passes}
    for _ in range(options.repeats):
        for name, once in alone.items():
            if not taken[name] or taken[name][0][0] <= SLOW:
                taken[name].append(pace.of(once))
        for setting, record in passes.items():
            done = recorded[setting]
            if done and (setting[1] > IN_TURNS or sum(done[0][0].computing) > SLOW):
                continue
            several = options.repeats if setting[1] > IN_TURNS else 1
            recordings, at = pace.of(partial(record, several))
            done += [(recording, at) for recording in recordings]
    as_timed = Times(
        {name: [seconds for seconds, _ in each] for name, each in taken.items()},
        {setting: [recording for recording, _ in each] for setting, each in recorded.items()},
    )
    usual = Times(
        {name: [pace.usual(at) * seconds for seconds, at in each] for name, each in taken.items()},
        {
            setting: [recording.scaled(pace.usual(at)) for recording, at in each]
            for setting, each in recorded.items()
        },
    )
    return as_timed, usual


def on_one_core(work: Callable[[], float]) -> float:
    """What `work` gives on the core that ranks have."""
    return World(1, Link(1.0)).run(lambda mesh: work()).results[0]


@torch.inference_mode()
def products(adapter: Adapter, rows: int) -> float:
    """Processor seconds of all linear layers of the blocks, in order, for so many tokens."""
    if rows > MOST_ROWS:
        return rows / MOST_ROWS * products(adapter, MOST_ROWS)
    layers = [layer for block in adapter.blocks for layer in block.modules()]
    pairs = [(layer, width) for layer in layers if (width := width_of(layer))]
    inputs = {width: torch.randn(1, rows, width).to(adapter.dtype) for _, width in pairs}
    with adapter.installed():  # packed weights serve then alone
        for layer, width in pairs[: len(pairs) // len(adapter.blocks)]:
            layer(inputs[width])
        start = time.thread_time()
        for layer, width in pairs:
            layer(inputs[width])
        return time.thread_time() - start


def width_of(layer: Any) -> int:
    """Numbers of a vector that a linear layer takes, GPT-2's and quantized ones too; else 0."""
    return int(getattr(layer, "in_features", 0) or getattr(layer, "nx", 0))


class Played(NamedTuple):
    """A recorded pass on a link; `rank`: the first one that has the answer."""

    recording: Recording
    laps: list[Lap]
    rank: int

    @classmethod
    def of(cls, recording: Recording, link: Link, costs: SocketCosts) -> Played:
        laps = recording.laps(link, costs)
        return cls(recording, laps, min(recording.answers, key=lambda n: laps[n].finish))

    @property
    def finish(self) -> float:
        return self.laps[self.rank].finish

    def figures(self, link: Link) -> dict[str, Any]:
        """Where the time goes."""
        recording, laps, rank = self
        stages = dict(recording.stages_of[rank])
        stages["prepare"] = recording.computing[rank] - sum(stages.values())
        stages["sockets"] = laps[rank].computing - recording.computing[rank]
        stages["wait"] = laps[rank].waiting
        return {
            "answer_rank": rank,
            "stages_ms": {name: 1e3 * seconds for name, seconds in stages.items()},
            "busy_ms": [round(1e3 * lap.computing, 2) for lap in laps],
            **traffic(recording, link),
        }


def traffic(recording: Recording, link: Link) -> dict[str, Any]:
    """What the busiest links carry, by the plan's frames."""
    sizes = [[event.size for event in events if event.to >= 0] for events in recording.ranks]
    sending = [sum(map(link.seconds, each)) for each in sizes]
    most = max(range(len(sending)), key=sending.__getitem__)
    receiving = [0.0] * len(sending)
    for event in (event for events in recording.ranks for event in events if event.to >= 0):
        receiving[event.to] += link.seconds(event.size)
    payload = sum(sizes[most]) - HEADER_SIZE * len(sizes[most])
    return {
        "frames": len(sizes[most]),
        "payload_bytes": payload,
        "downlink_ms": 1e3 * max(receiving),
        "uplink_ms": 1e3 * sending[most],
        "uplink_headers_ms": 1e3 * sending[most] - 8e-3 * payload / link.mbit_per_s,
    }


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank needs for the longest input: processes, the link as it is timed."""
    found = []
    for ranks in (1, *options.ranks):
        shared = RankSettings(
            options.model, max(options.tokens), options.codes[0], options.mbit, options.rtt_ms
        )
        say(f"  memory of {ranks} ranks at {shared.tokens} tokens")
        by_rank = outputs(MODULE, shared, ranks)
        found.append({"tokens": shared.tokens, "world_size": ranks, "by_rank": by_rank})
    return found


def memory_of_rank(setup: RankSettings) -> dict[str, int]:
    """Bytes: before the call, the most that there were, and what of them is weights."""
    with rank_of(setup, setup.tokens) as (subject, _, engine):
        before = peak_bytes()
        engine(outputs="one", **subject.inputs)
        weights = weight_bytes(subject.model)
        return {"loaded_bytes": before, "peak_bytes": peak_bytes(), "weight_bytes": weights}


if __name__ == "__main__":
    main()
