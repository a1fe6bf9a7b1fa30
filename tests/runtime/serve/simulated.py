"""A leader and its workers on a clock that is made up: what a pass takes is a formula.

The scheduler is the real one: `Leader`, `Worker`, `Sequences`. A worker runs in a thread, but only
while the leader waits for its report, on a clock that is set back to when it was told to begin, or
to go on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime.plan import Plan
from astra_runtime.serve import (
    leader,
    placement,
    rank,
    reading,
    requests,
    rounds,
    segments,
    sequences,
    work,
)
from astra_runtime.serve.batch import Cache
from astra_runtime.serve.service import Event, GenerationRequest, Token
from astra_runtime.sessions.cache import KeyValues

from .service import GREEDY, Numbers

BLOCKS, VOCABULARY = 30, 8
REPORTING = 0.02  # seconds until all reports are there, and the next job is out
EXCHANGE = 0.15  # seconds that all ranks wait for codes while they read a prompt
ENDS = 0.03, 0.06  # seconds before the first block of such a prompt, and behind its last one


def pass_seconds(rows: Sequence[tuple[int, int]]) -> float:
    """Of a model of 135 million parameters on one core: new tokens, and tokens so far, of each
    sequence. Products of more than three rows order the weights anew."""
    total = sum(new for new, _ in rows)
    seconds = 0.1 + 0.0025 * total + (0.04 if total > 3 else 0.0)
    return seconds + sum(
        0.018 * (length / 1024) if new == 1 else 5.7e-7 * new * (length - new / 2)
        for new, length in rows
    )


class World:
    """All ranks of a service, and what time it is.

    Args:
        slower: seconds of a pass, over those of `pass_seconds`, by the number of the pass.
    """

    def __init__(
        self,
        ranks: int,
        monkeypatch: pytest.MonkeyPatch,
        slower: Callable[[int], float] = lambda number: 1.0,
    ) -> None:
        self.ranks, self.now, self.passes = ranks, 100.0, 0
        self.rows: list[list[int]] = []  # of each pass of one rank
        self._slower = slower
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        modules = leader, placement, reading, requests, rounds, segments, sequences, work
        for module in modules:
            monkeypatch.setattr(module, "time", clock)
        for module in (reading, sequences):
            monkeypatch.setattr(module, "read", self.read)
        for module in (leader, rank):
            monkeypatch.setattr(module, "reporting", lambda engine: contextlib.nullcontext())
        monkeypatch.setattr(rank, "send_json", lambda mesh, report, **_: mesh.thread.report(report))
        monkeypatch.setattr(rank, "receive_json", lambda mesh, *_, **options: mesh.thread.job())
        self.threads = [RankThread(self, n) for n in range(1, ranks)]
        self.leader = SimulatedLeader(self)

    def close(self) -> None:
        for thread in self.threads:
            thread.stop()
        self.leader.close()

    def read(
        self,
        engine: Any,
        caches: Sequence[Cache],
        new: Sequence[Tensor],
        between: Callable[[int], None] | None = None,
    ) -> None:
        """In place of `batch.read`."""
        pairs = list(zip(caches, (ids.shape[1] for ids in new), strict=True))
        seconds = pass_seconds([(count, cache.length + count) for cache, count in pairs])
        seconds *= self._slower(self.passes)
        self.passes += 1
        self.rows.append([count for _, count in pairs])
        for block in range(BLOCKS):
            if between is not None:
                between(block)
            self.now += seconds / BLOCKS
        for cache, count in pairs:
            cache.advance(count, torch.zeros(VOCABULARY))

    def engine(self, number: int) -> Any:
        stats = SimpleNamespace(bytes_sent_total=0, bytes_received_total=0)
        mesh = SimpleNamespace(
            world_size=self.ranks,
            rank=number,
            timeout=5.0,
            stats=stats,
            peer_stats=dict.fromkeys(range(1, self.ranks), stats),
            begin=lambda: None,
            send=lambda *_, **options: None,
            disconnected=lambda: [],
        )
        model = SimpleNamespace(
            config=SimpleNamespace(max_position_embeddings=8192, vocab_size=VOCABULARY),
            get_input_embeddings=lambda: None,
        )
        adapter = SimpleNamespace(
            blocks=[None] * BLOCKS,
            num_key_value_heads=3,
            head_dim=64,
            dtype=torch.float32,
            device=torch.device("cpu"),
            model=model,
        )
        return SimpleNamespace(
            mesh=mesh,
            rank=number,
            adapter=adapter,
            model=model,
            plan=lambda tokens: Plan.make(tokens, self.ranks, causal=True),
            shard_weights=None,
            degraded=False,
            codebook=SimpleNamespace(codec=SimpleNamespace(keeps_sessions=False), coded=False),
            on_missing="raise",
            cancel=lambda: None,
        )


class RankThread:
    """A rank other than 0."""

    def __init__(self, world: World, number: int) -> None:
        engine = world.engine(number)
        engine.mesh.thread, engine.mesh.receive = self, lambda *_, **options: self._wait()
        self._world, self._told, self._reported = world, threading.Semaphore(0), threading.Event()
        self.next_job: Any = None
        self._report: Any = None
        self.worker = rank.Worker(engine, 1.0)
        self.worker.sequences.read_together = self._read_together  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self.worker.follow, daemon=True)
        self._thread.start()

    def until_report(self, start: float) -> Any:
        """Lets it compute from `start` on."""
        self._world.now = start
        self._reported.clear()
        self._told.release()
        assert self._reported.wait(60)
        return self._report

    def stop(self) -> None:
        self.next_job = {"do": "stop"}
        self._told.release()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def job(self) -> Any:
        self._wait()
        return self.next_job

    def report(self, report: Any) -> None:
        self._report = report
        self._reported.set()

    def _wait(self) -> None:
        assert self._told.acquire(timeout=60)

    def _read_together(
        self, prompt: Any, between: Callable[[int], None], *, beside: Sequence[float]
    ) -> Cache | None:
        return read_by_all(self._world, self.worker.sequences, prompt, between, beside)


def read_by_all(
    world: World,
    sequences: Any,
    prompt: Any,
    between: Callable[[int], None],
    beside: Sequence[float],
) -> Cache | None:
    """One rank's part of a prompt: it has fewer tokens than others where it decodes more."""
    tokens, rank = len(prompt.ids), sequences.engine.rank
    shard = -(-tokens // world.ranks)
    if beside:
        shard += round(sum(beside) / len(beside) - beside[rank])
    busy = pass_seconds([(shard, shard + (tokens - shard) // 2)]) + sum(ENDS)
    world.now += ENDS[0]
    for block in range(BLOCKS):
        between(block)
        world.now += (busy - sum(ENDS) + EXCHANGE) / BLOCKS
    world.now += ENDS[1]
    sequences.spans = [["compute", 0.0, busy]]
    if prompt.owner != rank:
        return None
    return Cache(KeyValues(BLOCKS), tokens, torch.zeros(VOCABULARY))


class SimulatedLeader(leader.Leader):
    """Has no thread: `run` goes through rounds."""

    def __init__(self, world: World) -> None:
        self._world, self._begun = world, 0.0
        super().__init__(world.engine(0), Numbers(), ends=[VOCABULARY - 1])
        self._thread.join()
        self._about = {n: {"machine": str(n), "memory": 1 << 34} for n in range(world.ranks)}
        self._begin_mesh()
        self._sequences.read_together = self._read_together  # type: ignore[method-assign]
        self._placement._uneven = True  # prompts are not kept
        self._reason = ""

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self._next_round()

    def _serve(self) -> None:
        pass

    def _send_job(self, **job: Any) -> None:
        self._begun = self._world.now
        for thread in self._world.threads:
            thread.next_job = job

    def _pause(self) -> float:
        busiest = super()._pause()
        self._begun = self._world.now  # of what follows, on all ranks
        return busiest

    def _reports(self) -> Iterator[dict[str, Any]]:
        world, stop = self._world, self._world.now
        for thread in world.threads:
            report = thread.until_report(self._begun)
            world.now = stop = max(stop, world.now)
            yield report
        world.now += REPORTING

    def _read_together(
        self,
        prompt: Any,
        between: Callable[[int], None],
        within_ms: float | None,
        beside: Sequence[float],
    ) -> Cache | None:
        return read_by_all(self._world, self._sequences, prompt, between, beside)

    def _num_coded(self, prompt: Any) -> int:
        return 0


class Client:
    """Asks for an answer, and notes when its tokens come."""

    def __init__(self, world: World, tokens: int, answer: int) -> None:
        self._world, self.start, self.is_over = world, world.now, False
        self.times: list[float] = []
        request = GenerationRequest("x", [1] * tokens, answer, GREEDY)
        self.ticket = world.leader.submit(request, self._hear)

    def _hear(self, event: Event | Exception | None) -> None:
        assert not isinstance(event, Exception), event
        if isinstance(event, Token):
            self.times.append(self._world.now)
        self.is_over = self.is_over or event is None

    @property
    def first(self) -> float:
        return self.times[0] - self.start

    @property
    def longest_wait(self) -> float:
        return max(b - a for a, b in zip(self.times, self.times[1:], strict=False))
