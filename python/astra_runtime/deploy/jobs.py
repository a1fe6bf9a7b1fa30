"""Jobs that all ranks of a running mesh do together: rank 0 is the leader, the others are workers.

The leader sends each job as one JSON frame; every rank, the leader too, then calls `Ranks.run`.
Jobs name what to send ("codes", "none", "drop"), never a file: a worker's codebook is its own.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..codes.codebook import Codebook
from ..codes.fields import DENSE_DTYPES
from ..control import Control
from ..cores import peak_bytes
from ..decoding import Choose
from ..engine import Engine
from ..errors import WireError
from ..evaluate import shard_loss
from ..models import adapt
from ..models.quantized import weight_bytes
from ..store import token_limit
from ..trace import Span, trace_of, tracing
from ..transport import Mesh, require
from ..transport.messages import receive_json, send_json
from .probe import probe

MAX_JOB, MAX_TRACE = 16 << 20, 64 << 20  # bytes of their JSON
CLOCK_TRIPS = 8  # round trips, of which the shortest gives the offset of two ranks' clocks


class Ranks:
    """This rank's model, its meshes and one engine for each way of exchanging.

    Args:
        mesh: carries the jobs, and exact answers that nobody times.
        timed: the mesh that timed runs cross, with its emulated link; the same one without.
        weights: shares of the tokens; None: balanced for the codebook, and the same for all.
        halo: of the engine with codes; None: its default. The others have none.
        on_missing, deadline_ms: as the engine's. Where ranks may be left out, a job goes on without
            those that are late or lost, unless it needs them.
        mixed_forms, pack_weights: as the engine's.
    """

    def __init__(
        self,
        model: nn.Module,
        codebook: Codebook,
        mesh: Mesh,
        timed: Mesh | None = None,
        weights: list[float] | None = None,
        halo: int | None = None,
        on_missing: Literal["raise", "degrade"] = "raise",
        deadline_ms: float | None = None,
        mixed_forms: bool = False,
        pack_weights: bool = False,
    ) -> None:
        self.model, self.codebook = model, codebook
        self.mixed_forms, self.pack_weights = mixed_forms, pack_weights
        self.on_missing, self.deadline_ms = on_missing, deadline_ms
        self.partial = on_missing == "degrade"
        self.mesh, self.timed = mesh, timed or mesh
        self.weights, self.halo = weights, halo
        self.tracing = False  # on the leader: from now on, jobs leave a trace on every rank
        # on the leader, of a generation: called with each new token, and before each block
        self.on_token: Callable[[Tensor], None] | None = None
        self.on_block: Callable[[int], None] | None = None
        self.trace = trace_of(next(model.parameters()).device)
        self._engines: dict[tuple[str, bool, int], Engine] = {}

    def engine(self, space: str, timed: bool, tokens: int) -> Engine:
        """The engine for "codes", "none" or "drop"; made at its first use, on all ranks."""
        key = (space, timed, tokens)
        if key not in self._engines:
            controls = (Codebook.dense(), Codebook.local_only())
            books = {"codes": self.codebook} | {book.space: book for book in controls}
            if space not in books:
                raise WireError("space of a job", " or ".join(books), space, 0)
            mesh, weights = self.timed if timed else self.mesh, self.weights
            if space != "codes" and weights is None:  # compared with the codes on the same shards
                of_codes = self.engine("codes", timed, tokens)
                weights = [float(size) for size in _sizes(of_codes, tokens)]
            halo = self.halo if space == "codes" else None
            self._engines[key] = Engine(
                self.model,
                books[space],
                mesh,
                weights=weights,
                halo=halo,
                deadline_ms=self.deadline_ms,
                on_missing=self.on_missing,
                mixed_forms=self.mixed_forms,
                pack_weights=self.pack_weights,
            )
            mesh.flush()  # nothing held by the link may be overtaken on the other mesh
        return self._engines[key]

    def submit(self, **job: Any) -> Any:
        """On the leader: has every rank run `job`, and returns the leader's result."""
        job |= {"trace": self.tracing}
        data = json.dumps(job).encode()
        workers = range(1, self.mesh.world_size)
        size = struct.pack("<Q", len(data))
        self.mesh.send(size, block=Control.JOB_SIZE, plan=0, to=workers, partial=self.partial)
        self.mesh.send(data, block=Control.JOB, plan=0, to=workers, partial=self.partial)
        return self.run(job)

    def worker_loop(self, idle: float) -> int:
        """On a worker: runs the leader's jobs until one is "stop", and counts them.

        `idle`: seconds to wait for a job; a leader that is gone is noticed at once.
        """
        jobs = 0
        while (job := self._receive_job(idle))["do"] != "stop":
            jobs += 1
            if job["do"] == "follow":
                return jobs + self.follow(idle)
            self.run(job)
        return jobs

    def follow(self, idle: float) -> int:
        """On a worker: makes the engine with codes, together with the leader of a service, and does
        what that says until it says stop; how many jobs there were."""
        from ..serve.rank import follow

        return follow(self.engine("codes", True, 0), idle)

    def _receive_job(self, idle: float) -> dict[str, Any]:
        size = struct.unpack("<Q", self._from_leader(8, Control.JOB_SIZE, idle))[0]
        if size > MAX_JOB:
            raise WireError("job size", f"at most {MAX_JOB}", size, 0)
        job = json.loads(bytes(self._from_leader(size, Control.JOB, self.mesh.timeout)))
        if not isinstance(job, dict) or "do" not in job:
            raise WireError("job", 'a JSON object with "do"', type(job).__name__, 0)
        return job

    def _from_leader(self, size: int, block: int, seconds: float) -> memoryview:
        views = self.mesh.receive(
            {0: size}, block=block, plan=0, timeout=seconds, partial=self.partial
        )
        require(self.mesh, views, [0], block, seconds)
        return views[0]

    def run(self, job: dict[str, Any]) -> Any:
        """One job, on every rank at once."""
        kind = job["do"]
        if kind == "stop":
            return None
        if kind == "timeline":
            return self.timeline()
        with tracing(self.trace if job.get("trace") else None):
            return self._work(kind, job)

    def _work(self, kind: str, job: dict[str, Any]) -> Any:
        if kind == "probe":
            dense = {f"dense {dtype}": Codebook.dense(dtype) for dtype in DENSE_DTYPES}
            if job["codebook"] != self.codebook.digest:
                raise WireError("codebook", self.codebook.digest, job["codebook"], 0)
            books = dense | {"codes": self.codebook}
            check_tokens(self.model, job["tokens"])
            return probe(self.mesh, self.timed, self.model, books, job["tokens"])
        ids = torch.tensor(job["input_ids"])
        if kind == "prefill":
            return self.prefill(ids, job["space"], job["repeats"])
        if kind == "loss":
            return self.loss(ids, job["space"])
        if kind == "generate":
            return self.generate(ids, job["space"], job["max_new_tokens"], job.get("sampling"))
        raise WireError("job", "prefill, loss, generate, probe, timeline or stop", kind, 0)

    def timeline(self) -> dict[int, list[Span]]:
        """On rank 0: every rank's spans, in ns of rank 0's clock; on the others nothing."""
        mesh = self.mesh
        spans = {0: self.trace.spans} if mesh.rank == 0 else {}
        for peer in range(1, mesh.world_size):
            if mesh.rank == 0:
                spans[peer] = self._receive_spans(peer)
            elif mesh.rank == peer:
                self._send_spans()
            self.barrier()
        return spans

    def _receive_spans(self, peer: int) -> list[Span]:
        """The peer's clock is read in the middle of the shortest of a few round trips."""
        mesh, trips = self.mesh, []
        for _ in range(CLOCK_TRIPS):
            start = time.perf_counter_ns()
            mesh.send(struct.pack("<q", start), block=Control.CLOCK, plan=0, to=(peer,))
            theirs = struct.unpack(
                "<q", mesh.receive({peer: 8}, block=Control.CLOCK, plan=0)[peer]
            )[0]
            stop = time.perf_counter_ns()
            trips.append((stop - start, theirs - (start + stop) // 2))
        behind = min(trips)[1]
        blocks = (Control.TRACE_SIZE, Control.TRACE)
        spans = receive_json(mesh, peer, blocks=blocks, limit=MAX_TRACE, what="trace")
        return [(name, block, start - behind, stop - behind) for name, block, start, stop in spans]

    def _send_spans(self) -> None:
        mesh = self.mesh
        for _ in range(CLOCK_TRIPS):
            mesh.receive({0: 8}, block=Control.CLOCK, plan=0)
            now = struct.pack("<q", time.perf_counter_ns())
            mesh.send(now, block=Control.CLOCK, plan=0, to=(0,))
        send_json(mesh, self.trace.spans, blocks=(Control.TRACE_SIZE, Control.TRACE), to=(0,))

    def barrier(self) -> None:
        """Returns when every rank has come here, or could have by a block's deadline."""
        late = self.deadline_ms / 1000 if self.partial and self.deadline_ms else None
        self._exchange(0.0, late)

    def report(self, value: float) -> list[float]:
        """Every rank's `value`, on every rank."""
        values = self._exchange(value, None)
        require(self.mesh, values, range(self.mesh.world_size), Control.REPORT, self.mesh.timeout)
        return [values[n] for n in range(self.mesh.world_size)]

    def _exchange(self, value: float, timeout: float | None) -> dict[int, float]:
        """The values of all ranks, or of those that sent theirs where some may be left out."""
        mesh, partial = self.mesh, self.partial
        others = [n for n in range(mesh.world_size) if n != mesh.rank]
        packed = struct.pack("<d", value)
        mesh.send(packed, block=Control.REPORT, plan=0, to=others, partial=partial)
        sizes = dict.fromkeys(others, 8)
        views = mesh.receive(sizes, block=Control.REPORT, plan=0, timeout=timeout, partial=partial)
        return {n: struct.unpack("<d", view)[0] for n, view in views.items()} | {mesh.rank: value}

    def prefill(self, ids: Tensor, space: str, repeats: int) -> dict[str, Any]:
        """Seconds to the last token's logits, on rank 0, and what crossed the sockets in one run.

        Every rank has the input when the clock starts; it stops when rank 0, which asked, has the
        logits (the last rank, which computes them, has them a vector's transfer earlier).
        `processor_seconds` are every rank's, by run.
        """
        engine = self.engine(space, True, ids.shape[1])
        seconds, processor = [], []
        before = self.timed.stats
        for _ in range(repeats):
            self.barrier()
            before = self.timed.stats
            start, used = time.perf_counter(), time.process_time()
            engine(input_ids=ids)
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
            self.timed.flush()
            self.barrier()
        sent = self.timed.stats - before
        return {
            "seconds": seconds,
            "processor_seconds": [self.report(value) for value in processor],
            "bits_per_token_block": engine.bits_per_token_block,
            "sizes": _sizes(engine, ids.shape[1]),
            "bytes_sent_payload": self.report(float(sent.bytes_sent_payload)),
        }

    def loss(self, ids: Tensor, space: str) -> tuple[float, int]:
        """Summed loss and number of predictions over the tokens after the first shard."""
        total, count = shard_loss(self.engine(space, False, ids.shape[1]), ids)
        return sum(self.report(total)), int(sum(self.report(float(count))))

    def generate(
        self, ids: Tensor, space: str, max_new_tokens: int, sampling: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The continued ids, the seconds at which each new token reached this rank, and what the
        prefill had to do without.

        sampling: the fields of a `serve.Sampling`; None: always the likeliest token.
        """
        engine = self.engine(space, True, ids.shape[1])
        times: list[float] = []

        def note_time(token: Tensor) -> None:
            times.append(time.perf_counter() - start)
            if self.on_token is not None:
                self.on_token(token)

        self.barrier()
        start = time.perf_counter()
        out = engine.generate(
            ids,
            max_new_tokens=max_new_tokens,
            choose=None if sampling is None else choose_by(sampling),
            on_token=note_time,
            on_block=self.on_block,
        )
        self.timed.flush()
        self.barrier()
        return {
            "ids": out[:, ids.shape[1] :].tolist(),
            "times": times,
            "bits_per_token_block": engine.bits_per_token_block,
            "degraded": engine.degraded,
            "missing": engine.missing,
            "devices": self.devices(),
        }

    def devices(self) -> dict[str, dict[str, int]]:
        """Threads, bytes of the weights and most bytes of memory, each by rank that was there."""
        late = self.deadline_ms / 1000 if self.partial and self.deadline_ms else None
        own = {
            "threads": torch.get_num_threads(),
            "weight_bytes": weight_bytes(self.model) + adapt(self.model).hooks.packed_bytes,
            "peak_bytes": peak_bytes(),
        }
        figures = {name: self._exchange(float(value), late) for name, value in own.items()}
        return {
            name: {str(rank): int(values[rank]) for rank in sorted(values)}
            for name, values in figures.items()
        }

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()


def choose_by(sampling: dict[str, Any]) -> Choose:
    """A `choose` for one sequence; see `serve.sampling`."""
    from ..serve.sampling import Sampler, sampling_from_json

    sampler = Sampler(sampling_from_json(sampling))
    return lambda ids, logits: torch.tensor([sampler.draw(logits[0]).token])


def check_tokens(model: nn.Module, tokens: int) -> None:
    """Refuses more tokens than the model reads, on every rank alike."""
    limit = token_limit(model)
    if limit is not None and not 1 <= tokens <= limit:
        raise ValueError(f"tokens: expected 1 to {limit}, the model's limit, got {tokens}")


def _sizes(engine: Engine, tokens: int) -> list[int]:
    """Tokens by rank; a decoder's first tokens, which every rank computes, count as rank 0's."""
    plan = engine.plan(tokens)
    sizes = [plan.size(n) for n in range(plan.world_size)]
    if plan.causal:
        sizes[0] += plan.copies
    return sizes
