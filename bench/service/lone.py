"""A lone request's time to first token, beside `engine(…)` on the same ranks, in turns.

    python -m bench.service.lone [--ranks 2] [--mbit 10] [--tokens 1024] [--pairs 20]

Each rank is a process with one thread, on a core of its own. Writes service_lone.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from subprocess import Popen
from typing import Any

import torch

import astra_runtime
from astra_runtime import Engine
from astra_runtime.console import say
from astra_runtime.deploy.launch import free_ports
from astra_runtime.serve import GenerationRequest, Leader, Sampling, follow
from astra_runtime.store import load_tokenizer
from astra_runtime.transport import Link
from astra_runtime.transport.certificates import ephemeral_keys
from bench.latency.subjects import MODELS, Subject
from bench.link.rank import begin, outputs_of, popen_options
from bench.report import Case, command_line, percentiles, quiet_transformers, write

PATIENCE = 1800.0


@dataclass(frozen=True)
class Settings:
    """What one rank runs."""

    rank: int
    addresses: list[str]
    model: str
    tokens: int
    codes: str
    mbit: float
    rtt_ms: float
    pairs: int
    keys: str = ""


def rank_main(setup: Settings) -> dict[str, list[float]]:
    """On rank 0 seconds to the first token, of the engine and of the service, by pair."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[setup.rank % len(cores)]})
    torch.set_num_threads(1)
    subject = Subject.make(setup.model, setup.tokens)
    ids = subject.inputs["input_ids"]
    link, world = Link(setup.mbit, setup.rtt_ms / 2), len(setup.addresses)
    seconds: dict[str, list[float]] = {"engine": [], "service": []}
    with (
        astra_runtime.connect(
            setup.rank, world, setup.addresses, timeout=PATIENCE, keys=setup.keys, link=link
        ) as mesh,
        Engine(subject.model, subject.codebook(setup.codes), mesh) as engine,
    ):
        for pair in range(1 + setup.pairs):
            moment = begin(mesh)
            engine(input_ids=ids)
            taken = time.monotonic() - moment
            mesh.flush()
            begin(mesh)
            if setup.rank:
                follow(engine)
                continue
            served = _first_token(engine, load_tokenizer(setup.model), ids[0].tolist())
            if pair:  # the first one warms up
                seconds["engine"].append(taken)
                seconds["service"].append(served)
    return seconds


def _first_token(engine: Engine, tokenizer: Any, ids: list[int]) -> float:
    with Leader(engine, tokenizer) as leader:
        request = GenerationRequest("lone", ids, 1, Sampling(temperature=0))
        start = time.monotonic()
        for _ in leader.stream(request):
            return time.monotonic() - start
    raise AssertionError("a stream has at least one event")


def measured(shared: Settings, ranks: int) -> dict[str, list[float]]:
    with ephemeral_keys(ranks) as keys:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(ranks)]
        processes = []
        for rank in range(ranks):
            setup = replace(shared, rank=rank, addresses=addresses, keys=str(keys))
            command = [sys.executable, "-m", "bench.service.lone", "--rank"]
            processes.append(Popen([*command, json.dumps(asdict(setup))], **popen_options()))
        return dict(json.loads(outputs_of(processes, PATIENCE)[0]))


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="bench.service.lone", description=about)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--codes", default="transform:100", help="SPACE:GROUPS, transform:BITS")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--rtt-ms", type=float, default=0.0)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--name", default="service_lone", help="of the result")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quiet_transformers()
    if options.rank:
        print(json.dumps(rank_main(Settings(**json.loads(options.rank)))))
        return
    names = ("model", "tokens", "codes", "mbit", "rtt_ms", "pairs")
    shared = Settings(0, [], **{name: getattr(options, name) for name in names})
    seconds = measured(shared, options.ranks)
    ms = {name: [1e3 * t for t in times] for name, times in seconds.items()}
    added = [ours - theirs for ours, theirs in zip(ms["service"], ms["engine"], strict=True)]
    shape = {"model": options.model, "tokens": options.tokens, "world_size": options.ranks}
    shape |= {"mbit_per_s": options.mbit, "rtt_ms": options.rtt_ms}
    case = Case(
        "service_lone",
        shape,
        "float32",
        f"astra {options.codes}",
        percentiles(ms["service"]),
        peers={"engine": statistics.median(ms["engine"])},
        extra={"added_ms": percentiles(added).p50},
    )
    say(f"  {case.ms.p50:.0f} ms beside {dict(case.peers)}, {dict(case.extra)}")
    path = write(
        options.name,
        [case],
        command=command_line("bench.service.lone", arguments),
        packages=("torch", "numpy", "transformers"),
        link={"emulator": "paced by the sender", "mbit_per_s": options.mbit},
    )
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
