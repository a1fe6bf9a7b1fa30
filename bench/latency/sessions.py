"""The second question about a document, beside the first: real processes on an emulated link.

    python -m bench.latency.sessions [--ranks 2] [--mbit 10] [--rtt-ms 2] [--question 24]

Each rank is a process with one thread, on a core of its own; the sender paces its frames. A session
reads a document and a first question (`first`), answers, then reads a second question (`second`),
on the same rank and, by a fork, on rank 0 (`second_other`). In turns with them `engine(...)` reads
the document and the first question (`engine`). Each time is from a moment that rank 0 names, with
the ids on every rank, until the first rank has the first new token. Writes latency_sessions.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from subprocess import Popen
from typing import Any

import torch
from torch import Tensor

import astra_runtime
from astra_runtime import Engine
from astra_runtime.console import say
from astra_runtime.deploy.launch import free_ports
from astra_runtime.sessions.session import Session
from astra_runtime.transport import Link, Mesh
from astra_runtime.transport.certificates import ephemeral_keys
from bench.latency.subjects import MODELS, Subject
from bench.link.rank import begin, outputs_of, popen_options
from bench.report import Case, command_line, percentiles, quiet_transformers, write

PATIENCE = 1800.0
NEW_TOKENS = 4  # of the first answer, so that there is something to go on behind


@dataclass(frozen=True)
class Settings:
    """What one rank runs."""

    rank: int
    addresses: list[str]
    model: str
    tokens: int
    question: int
    codes: str
    mbit: float
    rtt_ms: float
    repeats: int
    keys: str = ""


def rank_main(setup: Settings) -> dict[str, list[float | None]]:
    """Seconds of each repeat, by what was timed; None where this rank was not first to know."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[setup.rank % len(cores)]})
    torch.set_num_threads(1)
    subject = Subject.make(setup.model, setup.tokens + 2 * setup.question)
    ids = subject.inputs["input_ids"]
    first, second = ids[:, : setup.tokens + setup.question], ids[:, -setup.question :]
    link, world = Link(setup.mbit, setup.rtt_ms / 2), len(setup.addresses)
    seconds: dict[str, list[float | None]] = {}
    with (
        astra_runtime.connect(
            setup.rank, world, setup.addresses, timeout=PATIENCE, keys=setup.keys, link=link
        ) as mesh,
        Engine(subject.model, subject.codebook(setup.codes), mesh) as engine,
    ):
        for repeat in range(1 + setup.repeats):
            for name, taken in _repeat(engine, mesh, first, second).items():
                if repeat:  # the first one warms up
                    seconds.setdefault(name, []).append(taken)
    return seconds


def _repeat(engine: Engine, mesh: Mesh, first: Tensor, second: Tensor) -> dict[str, float | None]:
    session = engine.session()
    taken = {
        "engine": _timed(mesh, lambda: engine(input_ids=first, outputs="one") is not None),
        "first": _first_token(mesh, session, first),
    }
    session.generate(NEW_TOKENS)
    fork = session.fork()
    taken["second"] = _first_token(mesh, session, second)
    taken["second_other"] = _first_token(mesh, fork, second, rank=0)
    return taken


def _first_token(
    mesh: Mesh, session: Session, ids: Tensor, rank: int | None = None
) -> float | None:
    """Until this rank, the owner, has the token that follows `ids`."""

    def answer() -> bool:
        session.append(ids, rank=rank)
        if session.logits is None:
            return False
        session.logits.argmax(-1).item()
        return True

    return _timed(mesh, answer)


def _timed(mesh: Mesh, work: Callable[[], bool]) -> float | None:
    moment = begin(mesh)
    has = work()
    taken = time.monotonic() - moment
    mesh.flush()
    return taken if has else None


def measured(shared: Settings, ranks: int) -> dict[str, list[float]]:
    """Seconds of each repeat, by what was timed."""
    with ephemeral_keys(ranks) as keys:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(ranks)]
        processes = []
        for rank in range(ranks):
            setup = replace(shared, rank=rank, addresses=addresses, keys=str(keys))
            command = [sys.executable, "-m", "bench.latency.sessions", "--rank"]
            processes.append(Popen([*command, json.dumps(asdict(setup))], **popen_options()))
        of_ranks = [json.loads(output) for output in outputs_of(processes, PATIENCE)]
    return {
        name: [
            min(t for t in times if t is not None)
            for times in zip(*(of_rank[name] for of_rank in of_ranks), strict=True)
        ]
        for name in of_ranks[0]
    }


def cases_of(options: argparse.Namespace) -> list[Case]:
    shared = Settings(
        0,
        [],
        options.model,
        options.tokens,
        options.question,
        options.codes,
        options.mbit,
        options.rtt_ms,
        options.repeats,
    )
    seconds = measured(shared, options.ranks)
    ms = {name: percentiles([1e3 * t for t in times]) for name, times in seconds.items()}
    shape = {
        "model": options.model,
        "tokens": options.tokens,
        "world_size": options.ranks,
        "mbit_per_s": options.mbit,
        "rtt_ms": options.rtt_ms,
        "space": options.codes.partition(":")[0],
    }
    cases = []
    for name in ("first", "second", "second_other"):
        other = "engine" if name == "first" else "first"
        pairs = zip(seconds[name], seconds[other], strict=True)
        added: dict[str, Any] = {
            "question_tokens": options.question,
            f"{other}_ms": ms[other].p50,
            f"over_{other}": percentiles([ours / theirs for ours, theirs in pairs]).p50,
        }
        label = f"latency_session_{name}_{options.tokens}_{options.ranks}ranks_{options.mbit:g}mbit"
        method = f"astra {options.codes}"
        cases.append(Case(label, shape, "float32", method, ms[name], extra=added))
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="bench.latency.sessions", description=about)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--codes", default="transform:100", help="SPACE:GROUPS, transform:BITS")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="of the document")
    parser.add_argument("--question", type=int, default=24, help="tokens of a question")
    parser.add_argument("--mbit", type=float, default=10.0)
    parser.add_argument("--rtt-ms", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--name", default="latency_sessions", help="of the result")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quiet_transformers()
    if options.rank:
        print(json.dumps(rank_main(Settings(**json.loads(options.rank)))))
        return
    cases = cases_of(options)
    for case in cases:
        say(f"  {case.name}: {case.ms.p50:.0f} ms, {dict(case.extra)}")
    path = write(
        options.name,
        cases,
        command=command_line("bench.latency.sessions", arguments),
        packages=("torch", "numpy", "transformers"),
        link={"emulator": "paced by the sender", "mbit_per_s": options.mbit},
    )
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
