"""Several answers to one prompt, decoded by all ranks or by one of them, in turns.

    python -m bench.service.several [--ranks 2] [--mbit 10] [--n 8] [--answer 32] [--pairs 5]

Each rank is a process with one thread, on a core of its own. Milliseconds are from the request
until all answers are whole; the prompt is read anew each time, by all ranks. `owner`: the rank that
holds the prompt's last token decodes all of them. Writes service_several.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from astra_runtime.serve import Done, GenerationRequest, Leader, Sampling, Token
from astra_runtime.serve.costs import AnswerCosts
from bench import codebooks
from bench.latency.processes import RankSettings, parser_of, run, shape_of
from bench.report import Case, percentiles
from bench.service.leading import led


@dataclass(frozen=True)
class Settings(RankSettings):
    n: int = 8
    answer: int = 32
    pairs: int = 5


@dataclass
class Answered:
    """Seconds until the first token and the end, and how many ranks have answered."""

    first: float
    whole: float
    ranks: int


def rank_main(setup: Settings) -> dict[str, list[Any]]:
    """On rank 0, what was answered by all ranks and by the owner, by pair."""

    def pair(leader: Leader, ids: list[int]) -> dict[str, Any]:
        ways = {"every": False, "owner": True}
        return {name: vars(_answered(leader, setup, ids, alone)) for name, alone in ways.items()}

    return led(setup, setup.pairs, pair)


def _answered(leader: Leader, setup: Settings, ids: list[int], by_owner: bool) -> Answered:
    """One request; no token ends an answer before its time."""
    request = GenerationRequest(
        "several", ids, setup.answer, Sampling(seed=7), n=setup.n, fresh=True
    )
    alone = patch.object(AnswerCosts, "is_sooner", return_value=False)
    first, start = 0.0, time.monotonic()
    ranks: set[int] = set()
    with alone if by_owner else nullcontext():
        for event in leader.stream(request):
            if isinstance(event, Token) and not first:
                first = time.monotonic() - start
            if isinstance(event, Done):
                ranks.add(event.rank)
    return Answered(first, time.monotonic() - start, len(ranks))


def cases_of(setup: Settings, of_ranks: list[dict[str, list[Any]]]) -> list[Case]:
    every, owner = of_ranks[0]["every"], of_ranks[0]["owner"]
    case = Case(
        "several_answers",
        shape_of(setup, len(of_ranks)) | {"n": setup.n, "answer_tokens": setup.answer},
        "float32",
        f"astra {codebooks.full_name(setup.codes)}",
        percentiles([1e3 * one["whole"] for one in every]),
        peers={"owner": 1e3 * statistics.median(one["whole"] for one in owner)},
        extra={
            "answering_ranks": min(one["ranks"] for one in every),
            "first_token_ms": 1e3 * statistics.median(one["first"] for one in every),
            "first_token_ms_owner": 1e3 * statistics.median(one["first"] for one in owner),
        },
    )
    return [case]


def main(arguments: Sequence[str] | None = None) -> None:
    about, module = (__doc__ or "").splitlines()[0], "bench.service.several"
    parser = parser_of(module, about, rtt_ms=0.0, name="service_several")
    parser.add_argument("--n", type=int, default=8, help="answers to the prompt")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--pairs", type=int, default=5)
    run(parser, arguments, Settings, rank_main, cases_of)


if __name__ == "__main__":
    main()
