"""A long prompt that all ranks read while others are answered, beside the same prompt alone.

    python -m bench.service.beside [--ranks 2] [--mbit 10] [--tokens 1024] [--streams 1]

Each rank is a process with one thread, on a core of its own. In turns, the time to the prompt's
first token with nothing else going on (`idle`), and while `--streams` answers to such prompts are
decoded; `longest_wait_ms` is the longest that one of these waits for a token then. Writes
service_beside.json.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from astra_runtime.serve import GenerationRequest, Leader, Sampling, Token
from bench import codebooks
from bench.latency.processes import RankSettings, parser_of, run, shape_of
from bench.report import Case, percentiles
from bench.service.leading import led


@dataclass(frozen=True)
class Settings(RankSettings):
    streams: int = 1
    pairs: int = 10


class Stream:
    """An answer that goes on until it is cancelled, and the moments of its tokens."""

    def __init__(self, leader: Leader, ids: list[int]) -> None:
        self.times: list[float] = []
        self.begun, self.over = threading.Event(), threading.Event()
        request = GenerationRequest("stream", ids, None, Sampling(temperature=0), fresh=True)
        self._ticket = leader.submit(request, self._hear)
        self.begun.wait()

    def _hear(self, event: Any) -> None:
        if isinstance(event, Token):
            self.times.append(time.monotonic())
        if len(self.times) > 2 or event is None:
            self.begun.set()
        if event is None:
            self.over.set()

    def end(self) -> None:
        self._ticket.cancel()
        self.over.wait()

    def longest_wait(self, start: float, stop: float) -> float:
        """Seconds between two tokens, of those that were waited for between these moments."""
        return max(b - a for a, b in pairwise(self.times) if b > start and a < stop)


def rank_main(setup: Settings) -> dict[str, list[float]]:
    """On rank 0 seconds to the first token, alone and beside others, and their longest wait."""
    return led(setup, setup.pairs, lambda leader, ids: _pair(leader, ids, setup.streams))


def _pair(leader: Leader, ids: list[int], count: int) -> dict[str, float]:
    idle = _first_token(leader, ids)
    # a token less, so that nobody reads two of them apart
    streams = [Stream(leader, ids[: -1 - n]) for n in range(count)]
    time.sleep(0.5)  # they are decoded alone for a while
    start = time.monotonic()
    beside = _first_token(leader, ids)
    stop = time.monotonic()
    time.sleep(0.5)
    for stream in streams:
        stream.end()
    waits = [stream.longest_wait(start, stop) for stream in streams]
    return {"idle": idle, "beside": beside, "wait": max(waits)}


def _first_token(leader: Leader, ids: list[int]) -> float:
    request = GenerationRequest("prompt", ids, 1, Sampling(temperature=0), fresh=True)
    start, first = time.monotonic(), 0.0
    for event in leader.stream(request):
        if isinstance(event, Token):
            first = time.monotonic() - start
    return first


def cases_of(setup: Settings, of_ranks: list[dict[str, list[float]]]) -> list[Case]:
    ms = {name: [1e3 * t for t in times] for name, times in of_ranks[0].items()}
    ratios = [beside / idle for beside, idle in zip(ms["beside"], ms["idle"], strict=True)]
    case = Case(
        "service_beside",
        shape_of(setup, len(of_ranks)) | {"B": setup.streams},
        "float32",
        f"astra {codebooks.full_name(setup.codes)}",
        percentiles(ms["beside"]),
        peers={"idle": statistics.median(ms["idle"])},
        extra={
            "over_idle": percentiles(ratios).p50,
            "longest_wait_ms": max(ms["wait"]),
            "longest_wait_p50_ms": percentiles(ms["wait"]).p50,
        },
    )
    return [case]


def main(arguments: Sequence[str] | None = None) -> None:
    about, module = (__doc__ or "").splitlines()[0], "bench.service.beside"
    parser = parser_of(module, about, rtt_ms=0.0, name="service_beside")
    parser.add_argument("--streams", type=int, default=1, help="answers that are decoded meanwhile")
    parser.add_argument("--pairs", type=int, default=10)
    run(parser, arguments, Settings, rank_main, cases_of)


if __name__ == "__main__":
    main()
