"""Rank 0 of a service: takes requests, has all ranks work on them, hands out the tokens.

A thread of the leader's own goes from round to round (`rank.py`). It admits requests first come,
first served, as many as memory has room for; decides by cost whether a prompt is read by all ranks
together or by its owner alone; and lets owners rotate, so that N ranks decode for N users at once.
While the ranks read a prompt together, they pause at blocks that the job names, and decode a token
of everything else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from .. import decoding
from ..control import Control
from ..engine import Engine
from ..errors import AstraError, CallEnded
from ..store import token_limit
from ..transport import Mesh, peers_of
from ..transport.messages import receive_json, send_json
from .admission import Admission
from .costs import PromptCosts
from .rank import (
    ABOUT,
    JOB,
    Sequences,
    about_this_process,
    ending_together,
    read_together,
    receive_report,
)
from .service import (
    Event,
    GenerationRequest,
    NotReady,
    Peer,
    RequestRefused,
    ServiceFailed,
    Span,
    Status,
    TimeIsUp,
)
from .work import Answer, Deliver, Work

log = logging.getLogger("astra_runtime.serve")

IDLE_SECONDS = 0.1  # between looks at who is there, without work
BEAT_SECONDS = 1.0  # between rounds without work, in which a stopped rank is noticed
MEMORY_SHARE = 0.5  # of the free memory, for keys and values
MAX_ABOUT = 1 << 16  # bytes of what a worker says of itself
RETRY_SECONDS = 0.5  # between tries to form the mesh again
REASONS = {"closing": "the service is shutting down", "starting": "the service is starting"}


class Ticket:
    """A request that was submitted."""

    def __init__(self, leader: Leader, work: Work) -> None:
        self._leader, self._work = leader, work

    def cancel(self) -> None:
        """Ends it within one block or one token, from any thread; one that is over stays so."""
        self._leader.cancel(self._work)


class Leader:
    """Answers requests with all ranks of an engine's mesh; the other ranks run `follow`.

    Args:
        engine: rank 0's, of a decoder with a language-model head.
        tokenizer: the model's.
        max_queue: requests that may wait.
        memory: bytes for keys and values, on every rank; None: half of what is free there.
        ends: tokens that end an answer; None: the model's own.
        rejoin_seconds: how long one try to form the mesh again may take.
        announce: called with a new mesh before the engine uses it, for workers that make their
            engines upon a job.
        on_away: called with the error that ended the mesh, before it is formed again: the place to
            start processes anew.

    Example:
        >>> with Leader(engine, tokenizer) as leader:
        ...     for event in leader.stream(GenerationRequest("1", ids)):
        ...         print(event.text, end="")
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        max_queue: int = 64,
        memory: int | None = None,
        ends: Sequence[int] | None = None,
        rejoin_seconds: float = 30.0,
        announce: Callable[[Mesh], None] = lambda mesh: None,
        on_away: Callable[[AstraError], None] = lambda error: None,
    ) -> None:
        if engine.rank != 0:
            raise ValueError(f"engine: expected that of rank 0, got rank {engine.rank}")
        adapter, model = engine.adapter, engine.model
        self.engine, self.tokenizer = engine, tokenizer
        self.context_length = token_limit(model) or 1 << 30
        vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        self.vocabulary = vocabulary
        self._ends = decoding.end_tokens(model, ends, vocabulary)
        self._memory, self._rejoin_seconds = memory, rejoin_seconds
        self._announce, self._on_away = announce, on_away
        width = 2 * len(adapter.blocks) * adapter.num_key_value_heads * adapter.head_dim
        self._token_bytes = width * adapter.dtype.itemsize
        self._changed = threading.Condition()
        self._admission = Admission(engine.mesh.world_size, max_queue)
        self._sequences = Sequences(engine)
        self.costs = PromptCosts(engine)
        self._answers: dict[int, Answer] = {}
        self._drop: list[int] = []
        self._number = 0
        self._reading: Work | None = None
        self._just_read = False
        self._about: dict[int, dict[str, Any]] = {}
        self._reason = REASONS["starting"]
        self._closing = self._ended = False
        self._counts: Counter[str] = Counter()
        self._timeline: list[Span] = []
        self._progress: float | None = None
        self._beaten = 0.0
        self._thread = threading.Thread(target=self._serve, name="astra-leader", daemon=True)
        self._thread.start()

    # What others call, from any thread.

    def submit(self, request: GenerationRequest, deliver: Deliver) -> Ticket:
        """Queues a request; `deliver` gets its events in the leader's thread, then None.

        An error is delivered in place of further events. What `deliver` raises cancels the request.

        Raises:
            RequestRefused, QueueFull, NotReady: at once.
        """
        work = self._checked(request, deliver)
        with self._changed:
            if self._closing or self._ended:
                raise NotReady(REASONS["closing"])
            if self._reason:
                raise NotReady(self._reason)
            self._admission.add(work)
            self._changed.notify_all()
        return Ticket(self, work)

    def stream(self, request: GenerationRequest) -> Iterator[Event]:
        """The events of a request, for a host without asyncio. To close the iterator cancels it."""
        events: queue.SimpleQueue[Event | AstraError | None] = queue.SimpleQueue()
        ticket = self.submit(request, events.put)
        try:
            while (event := events.get()) is not None:
                if isinstance(event, AstraError):
                    raise event
                yield event
        finally:
            ticket.cancel()

    def cancel(self, work: Work) -> None:
        with self._changed:
            work.cancelled = True
            if self._reading is work:
                self.engine.cancel()
            self._changed.notify_all()

    def status(self) -> Status:
        """Who is here and what is going on; waits for nothing."""
        with self._changed:
            admission = self._admission
            return Status(
                not self._reason and not self._closing,
                REASONS["closing"] if self._closing else self._reason,
                len(admission),
                len(admission.running),
                admission.max_queue,
                [self._peer(rank) for rank in range(admission.world_size)],
                self._counts["lost"],
                self._counts["rejoined"],
                self._counts["degraded"],
                tuple(self._timeline),
                self._progress,
            )

    def wait_ready(self, seconds: float) -> bool:
        """Whether requests are answered, by then at the latest."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._reason or self._ended, seconds)

    def close(self, drain_s: float = 0.0) -> None:
        """Takes no request any more, lets those that it has end for so long, and ends the rest.

        The engine and its mesh stay open, and the workers' `follow` returns.
        """
        with self._changed:
            self._closing = True
            deadline = time.monotonic() + drain_s
            admission = self._admission
            while (len(admission) or admission.running) and not self._ended:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            for work in (*admission.waiting(), *admission.running):
                work.cancelled = True
            if self._reading is not None:
                self.engine.cancel()
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Before a request is queued.

    def _checked(self, request: GenerationRequest, deliver: Deliver) -> Work:
        tokens, limit = len(request.prompt_ids), self.context_length
        if tokens < 1:
            raise RequestRefused("prompt", "expected at least one token, got an empty prompt")
        if not all(0 <= id < self.vocabulary for id in request.prompt_ids):
            raise RequestRefused("prompt", f"expected token ids from 0 to {self.vocabulary - 1}")
        if not all(0 <= id < self.vocabulary for id in request.sampling.logit_bias):
            raise RequestRefused(
                "logit_bias", f"expected token ids from 0 to {self.vocabulary - 1}"
            )
        room = limit - tokens + 1  # the last token is never read
        asked = request.max_new_tokens
        if room < 1 or (asked is not None and asked > room):
            raise RequestRefused(
                "messages",
                f"this model's context is {limit} tokens, and the prompt has {tokens}"
                + ("" if asked is None else f", with {asked} more asked for"),
                "context_length_exceeded",
            )
        new_tokens = room if asked is None else asked
        if new_tokens < 1:
            raise RequestRefused("max_tokens", f"expected at least 1, got {new_tokens}")
        now = time.monotonic()
        size = self._token_bytes * (tokens + new_tokens) * request.n
        within = request.within_s
        deadline = None if within is None else now + within
        return Work(request, new_tokens, deliver, now, size, deadline)

    def _peer(self, rank: int) -> Peer:
        mesh = self.engine.mesh
        stats = mesh.stats if rank == 0 else mesh.peer_stats.get(rank)
        options, about = mesh.options, self._about.get(rank, {})
        here = rank == 0 or (not self._reason and rank in self._about)
        seconds = self.costs.token
        return Peer(
            rank,
            options.peers[rank] if options is not None and options.peers else "this process",
            "here" if here else "away",
            self._admission.answers_of(rank),
            0 if stats is None else stats.bytes_sent_total,
            0 if stats is None else stats.bytes_received_total,
            None if seconds is None else 1 / seconds,
            pid=about.get("pid"),
        )

    # The leader's thread.

    def _serve(self) -> None:
        formed = True
        while not self._ended:
            try:
                if not formed:
                    self._form()
                formed = True
                self._greet()
                while not self._ended:
                    self._next_round()
            except Exception as error:
                formed = False
                self._away(error)
        with suppress(AstraError):
            send_json(self.engine.mesh, {"do": "stop"}, blocks=JOB, to=peers_of(self.engine.mesh))
        self._fail_all(NotReady(REASONS["closing"]))

    def _greet(self) -> None:
        """Hears of every worker what it has, and is ready from then on."""
        mesh = self.engine.mesh
        about = {0: about_this_process()}
        self._sequences = Sequences(self.engine)
        send_json(mesh, {"do": "hello"}, blocks=JOB, to=peers_of(mesh))
        for rank in range(1, mesh.world_size):
            about[rank] = receive_json(
                mesh, rank, blocks=ABOUT, limit=MAX_ABOUT, what="description of a worker"
            )
        together = Counter(one["machine"] for one in about.values())
        with self._changed:
            self._about = about
            for rank, one in about.items():
                share = MEMORY_SHARE * one["memory"] / together[one["machine"]]
                self._admission.budget[rank] = self._memory or int(share)
            self._reason = ""
            self._changed.notify_all()

    def _form(self) -> None:
        """Connects the ranks again; the model stays loaded."""
        mesh = self.engine.mesh.reconnect(self._rejoin_seconds)
        self._announce(mesh)
        self.engine.rejoin(mesh)
        self._counts["rejoined"] += 1
        log.warning("all %d ranks are here again", mesh.world_size)

    def _away(self, error: Exception) -> None:
        """The mesh has ended: what ran has failed; what waits goes on waiting."""
        first = not self._reason
        known = isinstance(error, AstraError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        if not known:
            log.exception("the service met an unexpected error")
        with self._changed:
            self._reason = f"waiting for all devices: {text}"
            self._counts["lost"] += first
            self._answers.clear()
            self._drop.clear()
        if first:
            log.warning("the mesh has ended: %s", text)
        self.engine.mesh.abort(error)
        for work in tuple(self._admission.running):
            self._end(work, ServiceFailed(f"the answer could not be finished: {text}"))
        self._on_away(error if isinstance(error, AstraError) else AstraError(text))
        if not first:
            with self._changed:
                self._changed.wait_for(lambda: self._ended, RETRY_SECONDS)

    def _next_round(self) -> None:
        self._expire()
        with self._changed:
            work = self._admission.next()
            together = work is not None and self.costs.together_is_faster(work.prompt_tokens)
            active = bool(self._answers)
            idle = work is None and not active and not self._drop
            if idle and not self._ended:
                self._changed.wait(IDLE_SECONDS)
                idle = self._admission.next() is None
        if work is None and not active and idle:
            self._watch()
        elif work is not None and together and not (active and self._just_read):
            self._read(work)
        else:
            self._step(self._alone())

    def _watch(self) -> None:
        """Without work: a rank that is gone is noticed at once, a stopped one by a round's end."""
        mesh = self.engine.mesh
        lost = set(range(mesh.world_size)) - set(mesh.alive())
        now = time.monotonic()
        if lost or now - self._beaten > BEAT_SECONDS:
            self._step([])

    def _alone(self) -> list[Work]:
        """The requests that come next and whose owners read their prompts by themselves."""
        admitted = []
        with self._changed:
            while (work := self._admission.next()) is not None:
                if self.costs.together_is_faster(work.prompt_tokens):
                    break
                self._begin(work)
                admitted.append(work)
        return admitted

    def _begin(self, work: Work) -> None:
        self._admission.admit(work)
        work.begin(self._number, self.tokenizer, time.monotonic())
        self._number += work.request.n
        self._answers |= {answer.number: answer for answer in work.answers}

    def _job(self, **job: Any) -> None:
        mesh = self.engine.mesh
        with self._changed:
            drop, self._drop = self._drop, []
        self._sequences.drop(drop)
        job = {"do": "round", "drop": drop, "prompt": None, "pauses": [], "alone": []} | job
        send_json(mesh, job, blocks=JOB, to=peers_of(mesh))

    def _step(self, alone: list[Work]) -> None:
        """A round in which every rank decodes, and some begin to read prompts by themselves."""
        prompts = [work.prompt(self._ends) for work in alone]
        self._job(alone=[asdict(prompt) for prompt in prompts])
        mesh = self.engine.mesh
        mesh.begin()
        with self.engine.calling(), ending_together(mesh):
            for prompt in prompts:
                if prompt.owner == 0:
                    self._sequences.read_alone(prompt)
            self._sequences.step()
            self._collect()
        self._just_read, self._beaten = False, time.monotonic()

    def _read(self, work: Work) -> None:
        """A round in which all ranks read one prompt, with pauses for everybody else."""
        active = bool(self._answers)
        with self._changed:
            self._begin(work)
            self._reading = work
        tokens = work.prompt_tokens
        pauses = self.costs.pauses(tokens) if active else []
        prompt = work.prompt(self._ends)
        self._job(prompt=asdict(prompt), pauses=pauses)
        spent, start, problem = [0.0], time.perf_counter(), None
        blocks = len(self.engine.adapter.blocks)

        def between(block: int) -> None:
            self._progress = block / blocks
            if block in pauses:
                paused = time.perf_counter()
                self._pause()
                spent.append(time.perf_counter() - paused)
            if work.cancelled:
                self.engine.cancel()

        try:
            within = None if work.deadline is None else 1e3 * (work.deadline - time.monotonic())
            if within is not None and within <= 0:
                within = 1e-3
            cache = read_together(self.engine, prompt, between, within)
            work.degraded = self.engine.degraded
            self._counts["degraded"] += work.degraded
            if cache is not None:
                self._sequences.answer(prompt, cache)
        except (CallEnded, ValueError) as error:
            problem = str(error)
        finally:
            with self._changed:
                self._reading, self._progress = None, None
        seconds = time.perf_counter() - start - sum(spent)
        mesh = self.engine.mesh
        mesh.begin()
        with self.engine.calling(), ending_together(mesh):
            problem = self._collect() or problem
        if problem is None:
            self.costs.heard_together(tokens, seconds)
        else:
            self._end(work, self._failure(work, problem))
        self._just_read, self._beaten = True, time.monotonic()

    def _failure(self, work: Work, problem: str) -> AstraError:
        if work.deadline is not None and time.monotonic() >= work.deadline:
            return TimeIsUp(f"not finished within {work.request.within_s:g} s")
        return ServiceFailed(problem)

    def _pause(self) -> None:
        self._sequences.step()
        self._collect()
        mesh = self.engine.mesh
        mesh.send(b"\1", block=Control.GO_ON, plan=0, to=peers_of(mesh))
        self._expire()

    def _collect(self) -> str | None:
        """The tokens of this round, of all ranks; why a rank has not read a prompt, or None."""
        report, problem = self._sequences.report(), None
        self._sequences.confirm()
        self._heard(report)
        for rank in range(1, self.engine.mesh.world_size):
            report = receive_report(self.engine.mesh, rank)
            problem = report["problem"] or problem
            self._heard(report)
        return problem

    def _heard(self, report: dict[str, Any]) -> None:
        now = time.monotonic()
        for number, *token in report["tokens"]:
            answer = self._answers.get(number)
            if answer is None:
                continue
            if answer.work.heard(answer, token, now):
                del self._answers[number]
                if not token[-1]:  # its owner does not know
                    self._forget([number])
                if answer.work.whole:
                    self._end(answer.work, None)
        for number, reason in report["failed"]:
            if number in self._answers:
                work = self._answers[number].work
                self._end(work, ServiceFailed(reason))
        for number, seconds in report["read"]:
            if number in self._answers:
                self.costs.heard_alone(self._answers[number].work.prompt_tokens, seconds)

    def _expire(self) -> None:
        """Ends what was cancelled, and what has no time left."""
        now = time.monotonic()
        with self._changed:
            works = [*self._admission.waiting(), *self._admission.running]
        for work in works:
            late = work.deadline is not None and now >= work.deadline
            if work is self._reading:
                if late or work.cancelled:
                    self.engine.cancel()
            elif work.cancelled:
                self._end(work, None)
            elif late:
                self._end(work, TimeIsUp(f"not finished within {work.request.within_s:g} s"))

    def _end(self, work: Work, error: AstraError | None) -> None:
        """The last event of a request."""
        with self._changed:
            if work.state == "over":
                return
            if work.state == "queued":
                self._admission.remove(work)
            else:
                self._admission.finish(work, time.monotonic() - work.admitted)
            work.state = "over"
            left = [answer.number for answer in work.answers if not answer.done]
            for number in left:
                self._answers.pop(number, None)
            self._drop += left
            self._changed.notify_all()
        if error is not None:
            work.send(error)
        work.send(None)

    def _forget(self, numbers: list[int]) -> None:
        with self._changed:
            self._drop += numbers

    def _fail_all(self, error: AstraError) -> None:
        with self._changed:
            self._reason = self._reason or REASONS["closing"]
            works = [*self._admission.waiting(), *self._admission.running]
        for work in works:
            self._end(work, error)
