"""Ranks as real processes behind an emulated link, one thread and one core each: started by the
benchmark that they belong to, under its own name with `--rank`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from subprocess import Popen
from typing import Any, TypeVar

import torch

import astra_runtime
from astra_runtime import Engine
from astra_runtime.console import say
from astra_runtime.deploy.launch import free_ports
from astra_runtime.steady import keep_memory
from astra_runtime.transport import Link, Mesh
from astra_runtime.transport.certificates import ephemeral_keys
from bench import codebooks
from bench.latency.subjects import MODELS, Subject
from bench.link.rank import outputs_of, popen_options
from bench.report import Case, command_line, quiet_transformers, write

PATIENCE = 1800.0


@dataclass(frozen=True)
class RankSettings:
    """What one rank runs; what follows `keys` are options of the benchmark itself."""

    model: str
    tokens: int
    codes: str
    mbit: float
    rtt_ms: float
    rank: int = 0
    addresses: Sequence[str] = ()
    keys: str = ""


S = TypeVar("S", bound=RankSettings)


@contextmanager
def rank_of(setup: RankSettings, tokens: int) -> Iterator[tuple[Subject, Mesh, Engine]]:
    """This rank in its mesh; `tokens`: of the model's input."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[setup.rank % len(cores)]})
    torch.set_num_threads(1)
    keep_memory()
    subject = Subject.make(setup.model, tokens)
    link, world = Link(setup.mbit, setup.rtt_ms / 2), len(setup.addresses)
    with (
        astra_runtime.connect(
            setup.rank, world, setup.addresses, timeout=PATIENCE, keys=setup.keys, link=link
        ) as mesh,
        Engine(subject.model, subject.codebook(setup.codes), mesh) as engine,
    ):
        yield subject, mesh, engine


def outputs(module: str, shared: RankSettings, ranks: int) -> list[Any]:
    """What every rank of `module` gives, by rank."""
    with ephemeral_keys(ranks) as keys:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(ranks)]
        processes = []
        for rank in range(ranks):
            setup = replace(shared, rank=rank, addresses=addresses, keys=str(keys))
            command = [sys.executable, "-m", module, "--rank", json.dumps(asdict(setup))]
            processes.append(Popen(command, **popen_options()))
        return [json.loads(output) for output in outputs_of(processes, PATIENCE)]


def parser_of(module: str, about: str, *, rtt_ms: float, name: str) -> argparse.ArgumentParser:
    """The options of such a benchmark; `name`: of its result."""
    parser = argparse.ArgumentParser(prog=module, description=about)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument(
        "--codes", default=codebooks.DEFAULT, help="SPACE:GROUPS, transform:BITS, or default"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--rtt-ms", type=float, default=rtt_ms)
    parser.add_argument("--name", default=name, help="of the result")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    return parser


def run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    settings: type[S],
    rank_main: Callable[[S], Any],
    cases_of: Callable[[S, list[Any]], list[Case]],
) -> None:
    """As a rank, prints what `rank_main` gives; else starts the ranks and writes the cases."""
    options = parser.parse_args(arguments)
    quiet_transformers()
    if options.rank:
        print(json.dumps(rank_main(settings(**json.loads(options.rank)))))
        return
    given = vars(options)
    names = [field.name for field in fields(settings) if field.name in given]
    shared = settings(**{name: given[name] for name in names if name != "rank"})
    if shared.codes == codebooks.DEFAULT:  # fitted now, on all cores, if it was not before
        Subject.make(shared.model, shared.tokens).codebook(shared.codes)
    cases = cases_of(shared, outputs(parser.prog, shared, options.ranks))
    for case in cases:
        say(f"  {case.name}: {case.ms.p50:.0f} ms, {dict(case.peers)} {dict(case.extra)}")
    path = write(
        options.name,
        cases,
        command=command_line(parser.prog, arguments),
        packages=("torch", "numpy", "transformers"),
        link={"emulator": "paced by the sender", "mbit_per_s": options.mbit},
    )
    say(f"wrote {path}")


def shape_of(setup: RankSettings, ranks: int) -> dict[str, Any]:
    """As results have it."""
    return {
        "model": setup.model,
        "tokens": setup.tokens,
        "world_size": ranks,
        "mbit_per_s": setup.mbit,
        "rtt_ms": setup.rtt_ms,
        "space": codebooks.full_name(setup.codes).partition(":")[0],
    }
