"""Time to first token of ASTRA and its baselines on the virtual clock.

    python -m bench.latency [--models vit-base smollm2 …] [--ranks 2 4] [--tokens 1024]

Every method really computes what each of its ranks computes, one rank at a time on one core, and is
timed by CPU time; on each link only waiting is computed (`bench.link.virtual`). Writes
latency_<model>_<tokens>.json, a case for each of ASTRA's settings, number of ranks and link, with
the baselines beside it: `peers` are their medians, `floor_ms` the single device's over N. The clock
starts with the input on every rank and stops when one has the last token's (the class token's)
logits. Ranks have N times the memory bandwidth that one core has here; no link is shared.

`scaled` rows are for devices so much faster than this core that the ratio to block parallelism,
1 + communication/computation, can show: measured stage times divided by a factor.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from astra_runtime import Codebook
from astra_runtime.console import say
from astra_runtime.models import adapt
from bench.baselines import methods
from bench.latency.record import Recording, astra, baseline, median_stages
from bench.latency.subjects import MODELS, SETTINGS, Subject
from bench.link.model import Link
from bench.link.virtual import SocketCosts
from bench.report import Case, command_line, percentiles, quiet_transformers, write

MBIT, RTT_MS = (10.0, 20.0, 50.0, 100.0, 500.0), (0.2, 2.0, 20.0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["vit-base"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024])
    parser.add_argument("--settings", nargs="+", help="of ASTRA: SPACE:GROUPS, transform:BITS")
    parser.add_argument(
        "--methods", nargs="*", default=[n for n in methods() if n != "single"], help="baselines"
    )
    parser.add_argument("--mbit", nargs="+", type=float, default=MBIT)
    parser.add_argument("--rtt-ms", nargs="+", type=float, default=RTT_MS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speeds", nargs="+", type=float, default=[1.0], help="scaled rows beside")
    parser.add_argument("--name", help="of the result, in place of latency_<model>_<tokens>")
    options = parser.parse_args(arguments)
    quiet_transformers()
    torch.set_num_threads(1)
    costs = SocketCosts.measured()
    line = command_line("bench.latency", arguments)
    for model, tokens in itertools.product(options.models, options.tokens):
        subject = Subject.make(model, tokens)
        cases = measured(subject, options, costs)
        name = options.name or f"latency_{model}_{tokens}"
        write(
            name,
            cases,
            command=line,
            packages=("torch", "numpy", "transformers"),
            link={"emulator": "virtual clock", **asdict(Link(10.0)), "mbit_per_s": None},
            extra={"socket_costs": costs._asdict(), "repeats": options.repeats},
        )


def recorded(
    subject: Subject, options: argparse.Namespace, ranks: int, books: Mapping[str, Codebook]
) -> dict[str, list[Recording]]:
    """Recordings of every method by as many ranks: "single", ASTRA's settings, the baselines."""
    every, started = methods(), time.perf_counter()
    passes: dict[str, Callable[[], list[Recording]]] = {
        "single": lambda: baseline(subject, every["single"], 1, 1)
    }
    for setting, book in books.items():
        passes[setting] = partial(astra, subject, book, ranks, 1)
    for name in options.methods:
        if ranks <= heads_of(subject) or not name.startswith(("tp", "bp")):
            passes[name] = partial(baseline, subject, every[name], ranks, 1)
    recordings: dict[str, list[Recording]] = {name: [] for name in passes}
    for _ in range(options.repeats):  # all methods in turns: the machine's pace drifts
        for name, record in passes.items():
            recordings[name] += record()
    for name, of_method in recordings.items():
        busiest = statistics.median_low(max(recording.computing) for recording in of_method)
        say(f"  {subject.name} {subject.tokens} N={ranks} {name}: busiest rank {busiest:.3f} s")
    say(f"  in {time.perf_counter() - started:.0f} s")
    return recordings


def measured(
    subject: Subject, options: argparse.Namespace, costs: SocketCosts
) -> list[dict[str, Any] | Case]:
    """All cases of a model and length."""
    cases: list[dict[str, Any] | Case] = []
    settings = options.settings or SETTINGS[subject.name]
    books = {setting: subject.codebook(setting) for setting in settings}
    for ranks in options.ranks:
        others = recorded(subject, options, ranks, books)
        alone, ours = others.pop("single"), {s: (book, others.pop(s)) for s, book in books.items()}
        for speed, mbit, rtt_ms in itertools.product(options.speeds, options.mbit, options.rtt_ms):
            link = Link(mbit, rtt_ms=rtt_ms)

            def times(recordings: list[Recording], link: Link = link, speed: float = speed) -> Any:
                return percentiles([1e3 * r.finish(link, costs, speed) for r in recordings])

            single = times(alone)
            peers = {"single": single} | {name: times(them) for name, them in others.items()}
            for setting, (book, recordings) in ours.items():
                cases.append(
                    Case(
                        name=f"latency_{subject.name}_{subject.tokens}_{ranks}ranks_{mbit:g}mbit_"
                        f"{rtt_ms:g}ms" + (f"_scaled{speed:g}" if speed != 1 else ""),
                        shape={
                            "model": subject.name,
                            "tokens": subject.tokens,
                            "world_size": ranks,
                            "mbit_per_s": mbit,
                            "rtt_ms": rtt_ms,
                            "space": book.space,
                            "groups": book.groups,
                            "codewords": book.codewords,
                        },
                        dtype="float32",
                        impl=f"astra {setting}",
                        ms=times(recordings),
                        floor_ms=single.p50 / ranks,
                        peers={name: taken.p50 for name, taken in peers.items()},
                        extra=extra_of(subject, recordings, others, peers, speed),
                    )
                )
    return cases


def heads_of(subject: Subject) -> int:
    """Methods that cut heads can use as many ranks."""
    return int(adapt(subject.model).num_heads)


def extra_of(
    subject: Subject,
    recordings: list[Recording],
    others: dict[str, list[Recording]],
    peers: dict[str, Any],
    speed: float,
) -> dict[str, Any]:
    """What the schema has no place for: spread and bytes of the baselines, our stages."""
    blocks, tokens = len(adapt(subject.model).blocks), subject.tokens
    every = {"astra": recordings} | others
    return {
        "speed": speed,
        "peers_spread": {name: [taken.p20, taken.p80] for name, taken in peers.items()},
        "busy_ms": {name: 1e3 * max(them[0].computing) / speed for name, them in every.items()},
        # of all ranks together, over the wire's fan-out
        "sent_bits_per_token_block": {
            name: 8 * them[0].payload / (tokens * blocks) for name, them in every.items()
        },
        "stages_ms": {k: v / speed for k, v in median_stages(recordings).items()},
    }


if __name__ == "__main__":
    main()
