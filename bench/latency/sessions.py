"""The second question about a document, beside the first: real processes on an emulated link.

    python -m bench.latency.sessions [--ranks 2] [--mbit 10] [--rtt-ms 2] [--question 24]

Each rank is a process with one thread, on a core of its own; the sender paces its frames. A session
reads a document and a first question (`first`), answers, then reads a second question (`second`),
on the same rank and, by a fork, on rank 0 (`second_other`). In turns with them `engine(...)` reads
the document and the first question (`engine`). Each time is from a moment that rank 0 names, with
the ids on every rank, until the first rank has the first new token. Writes latency_sessions.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from astra_runtime import Engine
from astra_runtime.sessions.session import Session
from astra_runtime.transport import Mesh
from bench import codebooks
from bench.latency.processes import RankSettings, parser_of, rank_of, run, shape_of
from bench.link.rank import begin
from bench.report import Case, percentiles

NEW_TOKENS = 4  # of the first answer, so that there is something to go on behind


@dataclass(frozen=True)
class Settings(RankSettings):
    question: int = 24
    repeats: int = 20


def rank_main(setup: Settings) -> dict[str, list[float | None]]:
    """Seconds of each repeat, by what was timed; None where this rank was not first to know."""
    seconds: dict[str, list[float | None]] = {}
    with rank_of(setup, setup.tokens + 2 * setup.question) as (subject, mesh, engine):
        ids = subject.inputs["input_ids"]
        first, second = ids[:, : setup.tokens + setup.question], ids[:, -setup.question :]
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


def cases_of(setup: Settings, of_ranks: list[dict[str, list[float | None]]]) -> list[Case]:
    ranks = len(of_ranks)
    seconds = {
        name: [
            min(t for t in times if t is not None)
            for times in zip(*(of_rank[name] for of_rank in of_ranks), strict=True)
        ]
        for name in of_ranks[0]
    }
    ms = {name: percentiles([1e3 * t for t in times]) for name, times in seconds.items()}
    cases = []
    for name in ("first", "second", "second_other"):
        other = "engine" if name == "first" else "first"
        pairs = zip(seconds[name], seconds[other], strict=True)
        added: dict[str, Any] = {
            "question_tokens": setup.question,
            f"{other}_ms": ms[other].p50,
            f"over_{other}": percentiles([ours / theirs for ours, theirs in pairs]).p50,
        }
        label = f"latency_session_{name}_{setup.tokens}_{ranks}ranks_{setup.mbit:g}mbit"
        shape, method = shape_of(setup, ranks), f"astra {codebooks.full_name(setup.codes)}"
        cases.append(Case(label, shape, "float32", method, ms[name], extra=added))
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").splitlines()[0]
    module = "bench.latency.sessions"
    parser = parser_of(module, about, rtt_ms=2.0, name="latency_sessions")
    parser.add_argument("--question", type=int, default=24, help="tokens of a question")
    parser.add_argument("--repeats", type=int, default=20)
    run(parser, arguments, Settings, rank_main, cases_of)


if __name__ == "__main__":
    main()
