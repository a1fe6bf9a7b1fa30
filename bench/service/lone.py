"""A lone request's time to first token, beside `engine(…)` on the same ranks, in turns.

    python -m bench.service.lone [--ranks 2] [--mbit 10] [--tokens 1024] [--pairs 20]

Each rank is a process with one thread, on a core of its own. Writes service_lone.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from astra_runtime import Engine
from astra_runtime.serve import GenerationRequest, Leader, Sampling, follow
from astra_runtime.store import load_tokenizer
from bench import codebooks
from bench.latency.processes import RankSettings, parser_of, rank_of, run, shape_of
from bench.link.rank import begin
from bench.report import Case, percentiles


@dataclass(frozen=True)
class Settings(RankSettings):
    pairs: int = 20


def rank_main(setup: Settings) -> dict[str, list[float]]:
    """On rank 0 seconds to the first token, of the engine and of the service, by pair."""
    seconds: dict[str, list[float]] = {"engine": [], "service": []}
    with rank_of(setup, setup.tokens) as (subject, mesh, engine):
        ids = subject.inputs["input_ids"]
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


def cases_of(setup: Settings, of_ranks: list[dict[str, list[float]]]) -> list[Case]:
    ms = {name: [1e3 * t for t in times] for name, times in of_ranks[0].items()}
    added = [ours - theirs for ours, theirs in zip(ms["service"], ms["engine"], strict=True)]
    case = Case(
        "service_lone",
        shape_of(setup, len(of_ranks)),
        "float32",
        f"astra {codebooks.full_name(setup.codes)}",
        percentiles(ms["service"]),
        peers={"engine": statistics.median(ms["engine"])},
        extra={"added_ms": percentiles(added).p50},
    )
    return [case]


def main(arguments: Sequence[str] | None = None) -> None:
    about, module = (__doc__ or "").splitlines()[0], "bench.service.lone"
    parser = parser_of(module, about, rtt_ms=0.0, name="service_lone")
    parser.add_argument("--pairs", type=int, default=20)
    run(parser, arguments, Settings, rank_main, cases_of)


if __name__ == "__main__":
    main()
