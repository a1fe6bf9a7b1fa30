"""The same comparison with real processes: N ranks behind the user-space switch.

    python -m bench.latency.real [--models vit-base smollm2] [--ranks 2] [--mbit 10] [--rtt-ms 2]

Each rank is a process with one thread, on a core of its own, in a network namespace of its own;
ASTRA's frames (TLS) and the baselines' (gloo, in plain) cross the same switch
(`bench.link.switch`), which takes its part of the cores. All methods run in one set of processes,
in turns. The clock starts at a moment that rank 0 names, with the input on every rank, and stops
when a rank has the answer. The single device is rank 0 alone, the others asleep. Writes
latency_real_<model>.json, with what the virtual clock says of the same methods beside it
(`virtual_ms`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import astra_runtime
from astra_runtime import Engine
from astra_runtime.console import say
from astra_runtime.costs import engine_plan
from astra_runtime.deploy import predict
from astra_runtime.deploy.rates import measure_rates
from astra_runtime.models import adapt
from astra_runtime.steady import keep_memory
from astra_runtime.transport import Link as PacedLink
from astra_runtime.transport.certificates import ephemeral_keys
from bench.baselines import GlooComm, methods
from bench.latency import record
from bench.latency.subjects import MODELS, SETTINGS, Subject
from bench.link.model import Link
from bench.link.rank import begin, outputs_of, popen_options
from bench.link.switch import Namespaces
from bench.link.virtual import SocketCosts
from bench.report import Case, command_line, percentiles, quiet_transformers, write

SLOW = 8.0  # seconds: what takes longer is measured once
PATIENCE = 1800.0


@dataclass(frozen=True)
class Settings:
    """What one rank runs."""

    rank: int
    addresses: list[str]
    model: str
    tokens: int
    settings: list[str]
    baselines: list[str]
    repeats: int
    keys: str = ""


def rank_main(setup: Settings) -> dict[str, list[float | None]]:
    """Seconds of each pass by method; None where this rank had no answer."""
    import torch.distributed as dist

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[setup.rank % len(cores)]})
    torch.set_num_threads(1)
    keep_memory()
    subject = Subject.make(setup.model, setup.tokens)
    world = len(setup.addresses)
    host = setup.addresses[0].rpartition(":")[0]
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{host}:5900",
        rank=setup.rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    seconds: dict[str, list[float | None]] = {}
    every = methods()
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(
            astra_runtime.connect(
                setup.rank, world, setup.addresses, timeout=PATIENCE, keys=setup.keys
            )
        )
        group = GlooComm(dist.distributed_c10d._get_default_group())
        only_first, single = dist.new_group([0]), every["single"].run
        alone = GlooComm(only_first) if setup.rank == 0 else None
        passes: dict[str, Any] = {
            "single": lambda: alone and single(subject.model, subject.inputs, alone)
        }
        for setting in setup.settings:
            engine = stack.enter_context(Engine(subject.model, subject.codebook(setting), mesh))
            passes[f"astra {setting}"] = lambda e=engine: e(outputs="one", **subject.inputs)
        for name in setup.baselines:
            run = every[name].run
            passes[name] = lambda run=run: run(subject.model, subject.inputs, group)
        for repeat in range(1 + setup.repeats):  # all methods in turns: the machine's pace drifts
            for name, once in list(passes.items()):
                moment = begin(mesh)
                has = once() is not None
                taken = time.monotonic() - moment
                mesh.flush()
                dist.barrier()
                slowest = torch.tensor(taken)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                slow = float(slowest) > SLOW
                if repeat or slow:
                    seconds.setdefault(name, []).append(taken if has else None)
                if slow:
                    del passes[name]  # one pass is all there is
        if setup.rank == 0:
            say(
                f"  {setup.model}: "
                + ", ".join(f"{name} {times}" for name, times in seconds.items())
            )
    dist.destroy_process_group()
    return seconds


def measured(shared: Settings, link: Link, world: int) -> tuple[dict[str, list[float]], Any]:
    """Seconds by method, of the first rank that had the answer; and the switch's report."""
    with Namespaces(world, link) as net, ephemeral_keys(world) as keys:
        addresses = [f"{address}:5000" for address in net.addresses]
        options = popen_options()
        options["env"] |= {"GLOO_SOCKET_IFNAME": "link0"}
        processes = []
        for rank in range(world):
            own = Settings(
                **{**asdict(shared), "rank": rank, "addresses": addresses, "keys": str(keys)}
            )
            command = [
                sys.executable,
                "-m",
                "bench.latency.real",
                "--rank",
                json.dumps(asdict(own)),
            ]
            processes.append(net.launch(rank, command, **options))
        outputs = outputs_of(processes, PATIENCE)
        report = net.report()
    of_ranks = [json.loads(output) for output in outputs]
    seconds = {
        name: [
            min(t for t in times if t is not None)
            for times in zip(*(of_rank[name] for of_rank in of_ranks), strict=True)
        ]
        for name in of_ranks[0]
    }
    return seconds, report


def cases_of(options: argparse.Namespace, model: str) -> tuple[list[Case], Any]:
    link = Link(options.mbit, rtt_ms=options.rtt_ms)
    settings = options.settings or list(SETTINGS[model])
    shared = Settings(0, [], model, options.tokens, settings, options.methods, options.repeats)
    seconds, report = measured(shared, link, options.ranks)
    ms = {name: percentiles([1e3 * t for t in times]) for name, times in seconds.items()}
    virtual = on_virtual(options, model, settings, link)
    planned = on_plan(options, model, settings)
    single = ms["single"].p50
    peers = {name: t.p50 for name, t in ms.items() if not name.startswith("astra ")}
    subject = Subject.make(model, 64 if model == "tiny" else options.tokens)
    cases = []
    for setting in settings:
        book = subject.codebook(setting)
        own = ms[f"astra {setting}"]
        cases.append(
            Case(
                name=f"latency_real_{model}_{options.tokens}_{options.ranks}ranks_"
                f"{options.mbit:g}mbit_{options.rtt_ms:g}ms",
                shape={
                    "model": model,
                    "tokens": options.tokens,
                    "world_size": options.ranks,
                    "mbit_per_s": options.mbit,
                    "rtt_ms": options.rtt_ms,
                    "space": book.space,
                    "groups": book.groups,
                    "codewords": book.codewords,
                },
                dtype="float32",
                impl=f"astra {setting}",
                ms=own,
                floor_ms=single / options.ranks,
                peers=peers,
                extra={
                    "peers_spread": {n: [t.p20, t.p80] for n, t in ms.items()},
                    "virtual_ms": virtual,
                    "agreement": virtual[f"astra {setting}"] / own.p50,
                    "planned_ms": planned,
                    "planned_over_real": planned[f"astra {setting}"] / own.p50,
                    "speedup": single / own.p50,
                    "switch_cpu_share": report.cpu_share,
                },
            )
        )
    return cases, report


def on_virtual(
    options: argparse.Namespace, model: str, settings: Sequence[str], link: Link
) -> dict[str, float]:
    """Median milliseconds of the same methods on the virtual clock."""
    torch.set_num_threads(1)
    subject, costs, every = Subject.make(model, options.tokens), SocketCosts.measured(), methods()
    of_methods = {"single": record.baseline(subject, every["single"], 1, options.repeats)}
    for setting in settings:
        book = subject.codebook(setting)
        of_methods[f"astra {setting}"] = record.astra(subject, book, options.ranks, options.repeats)
    for name in options.methods:
        of_methods[name] = record.baseline(subject, every[name], options.ranks, 1)
    return {
        name: percentiles([1e3 * r.finish(link, costs) for r in recordings]).p50
        for name, recordings in of_methods.items()
    }


def on_plan(options: argparse.Namespace, model: str, settings: Sequence[str]) -> dict[str, float]:
    """Milliseconds that `astra plan` predicts, from measuring this machine."""
    torch.set_num_threads(1)
    subject = Subject.make(model, options.tokens)
    adapter, planned = adapt(subject.model), {}
    link = PacedLink(options.mbit, options.rtt_ms / 2)
    for setting in settings:
        book = subject.codebook(setting)
        rates = measure_rates(subject.model, book, options.tokens)
        plan = engine_plan(adapter, book, options.tokens, options.ranks)
        prediction = predict.first_token(adapter, book, plan, [rates] * options.ranks, link)
        planned[f"astra {setting}"] = 1e3 * prediction.seconds
        planned["single"] = 1e3 * predict.one_device(adapter, rates, options.tokens)
    return planned


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.latency.real", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=["vit-base", "smollm2"]
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--rtt-ms", type=float, default=2.0)
    parser.add_argument("--settings", nargs="+", help="of ASTRA: SPACE:GROUPS, transform:BITS")
    parser.add_argument("--methods", nargs="*", default=[n for n in methods() if n != "single"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", help="of the result, in place of latency_real_<model>")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quiet_transformers()
    if options.rank:
        print(json.dumps(rank_main(Settings(**json.loads(options.rank)))))
        return
    line = command_line("bench.latency.real", arguments)
    for model in options.models:
        cases, report = cases_of(options, model)
        for case in cases:
            say(f"{case.name} {case.impl}: {case.extra['speedup']:.2f}×, {case.ms}")
        write(
            options.name or f"latency_real_{model}",
            cases,
            command=line,
            packages=("torch", "numpy", "transformers"),
            link={"emulator": "user-space switch", **asdict(Link(options.mbit, options.rtt_ms))},
            extra={"switch": asdict(report), "repeats": options.repeats},
        )


if __name__ == "__main__":
    main()
