"""Rank 0 of a service that generates: takes requests, has all ranks work, hands out the tokens.

It admits requests first come, first served, as many as memory has room for; decides by cost whether
a prompt is read by all ranks together or by its owner alone, and whether several answers to it are
decoded by one rank or by several; and lets owners rotate, so that N ranks decode for N users at
once. While the ranks read a prompt together, they pause at blocks that the job names, and decode a
token of everything else.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from .. import decoding
from ..control import Control
from ..costs import EXACT_TOKENS
from ..engine import Engine
from ..errors import AstraError, CallEnded, anew
from ..inputs import LONGEST_MS, check_integer
from ..models import vocabulary_of
from ..store import token_limit
from ..trace import stage
from ..transport import peers_of
from .admission import Admission
from .costs import AnswerCosts, PromptCosts
from .placement import Placement
from .prompt import Move, Prompt
from .rank import reporting
from .requests import Requests
from .rounds import IDLE_SECONDS, LEAST_PATIENCE, Rounds
from .segments import Course
from .sequences import Sequences, busy_seconds
from .service import CLOSING, Event, GenerationRequest, NotReady, Span, Status
from .work import Deliver, Limits, Work

MEMORY_SHARE = 0.5  # of the free memory, for keys and values
KEPT_SHARE = 0.25  # of that, for prompts that are kept after their answers


class Ticket:
    """A request that was submitted."""

    def __init__(self, leader: Leader, work: Work) -> None:
        self._leader, self._work = leader, work

    def cancel(self) -> None:
        """Ends it within one block or one token, from any thread; one that is over stays so."""
        self._leader.cancel(self._work)


class Leader(Rounds):
    """Answers requests with all ranks of an engine's mesh; the other ranks run `follow`.

    Args:
        engine: rank 0's, of a decoder with a language-model head.
        tokenizer: the model's.
        max_queue: requests that may wait.
        memory: bytes for keys and values, on every rank; None: half of what is free there.
        ends: tokens that end an answer; None: the model's own.
        options: those of `Rounds`.

    Example:
        with Leader(engine, tokenizer) as leader:
            for event in leader.stream(GenerationRequest("1", ids)):
                print(event.text, end="")
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        max_queue: int = 64,
        memory: int | None = None,
        ends: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        check_integer("max_queue", max_queue, 0)
        if memory is not None:
            check_integer("memory", memory, 1)
        super().__init__(engine, **options)
        adapter, model = engine.adapter, engine.model
        self.tokenizer = tokenizer
        self.context_length = token_limit(model) or 1 << 30
        self.vocabulary = vocabulary_of(model)
        self._ends = decoding.end_tokens(model, ends, self.vocabulary)
        self._memory = memory
        width = 2 * len(adapter.blocks) * adapter.num_key_value_heads * adapter.head_dim
        self._token_bytes = width * adapter.dtype.itemsize
        self._admission = Admission(engine.mesh.world_size, max_queue)
        self._sequences = Sequences(engine)
        self.costs = PromptCosts(engine)
        self.answer_costs = AnswerCosts(self.costs)
        costs = self.costs, self.answer_costs
        keeps = self._sequences.kept.possible
        uneven = keeps and engine.shard_weights is None
        self._placement = Placement(self._admission, *costs, keeps, uneven)
        self._requests = Requests(engine, self._admission, *costs, keeps, self._changed)
        self._moving: tuple[Work, Move] | None = None  # with the next step
        self._progress: float | None = None
        self._just_read = False
        self._is_long = False  # the round: a rank reads a prompt by itself
        self._problem: str | None = None  # of the round
        self._overdue = False  # answers wait since the last pause of a prompt that all have read
        self._spans: dict[int, list[Any]] = {}  # of the round before, by rank
        self._busiest = 0.0  # seconds of that rank's computing in it
        self._thread.start()

    # What others call, from any thread.

    def submit(self, request: GenerationRequest, deliver: Deliver) -> Ticket:
        """Queues a request; `deliver` gets its events in the leader's thread, then None.

        An error is delivered in place of further events. What `deliver` raises cancels the request.

        Raises:
            RequestRefused, QueueFull, NotReady: at once.
        """
        if not callable(deliver):
            raise TypeError(f"deliver: expected a function, got {type(deliver).__name__}")
        memory = max(self._admission.budget.values())
        limits = Limits(self.context_length, self.vocabulary, self._token_bytes, memory)
        work = limits.work_of(request, deliver)
        with self._changed:
            self.check_open()
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
                    raise anew(event)
                yield event
        finally:
            ticket.cancel()

    def cancel(self, work: Work) -> None:
        self._requests.cancel(work)

    def status(self) -> Status:
        """Who is here and what is going on; waits for nothing."""
        with self._changed:
            admission, reason = self._admission, self.reason
            return Status(
                not reason,
                reason,
                len(admission),
                len(admission.running),
                admission.max_queue,
                [
                    self.peer(rank, admission.answers_of(rank), self.costs.tokens_per_s)
                    for rank in range(admission.world_size)
                ],
                self._counts["lost"],
                self._counts["rejoined"],
                self._counts["degraded"],
                tuple(self._requests.timeline),
                self._progress,
            )

    # The leader's thread.

    def _is_busy(self) -> bool:
        return self._requests.is_busy

    def _begin_mesh(self) -> None:
        self._sequences = Sequences(self.engine)
        self._moving = None
        together = Counter(one["machine"] for one in self._about.values())
        room = {
            rank: self._memory or int(MEMORY_SHARE * one["memory"] / together[one["machine"]])
            for rank, one in self._about.items()
        }
        keep = KEPT_SHARE if self._sequences.kept.possible else 0.0
        self._admission.budget |= {n: int((1 - keep) * size) for n, size in room.items()}
        self._requests.begin_mesh(int(keep * min(room.values()) / self._token_bytes))

    def _end_running(self, error: AstraError) -> None:
        self._requests.end_running(error)

    def _end_all(self, error: AstraError) -> None:
        self._requests.end_all(error)

    def _beat(self) -> None:
        self._step([])

    def _next_round(self) -> None:
        requests = self._requests
        requests.expire()
        with self._changed:
            work, active = requests.next(), requests.is_active
            if work is None and not active and not self._ended:
                self._changed.wait(IDLE_SECONDS)
                if self._is_busy() or self._ended:
                    return
            place = None if work is None else self._placement.of(work)
        if work is not None and place == "all" and not (active and self._just_read):
            self._read(work)
        elif work is not None or active:
            self._step([] if self._overdue else self._alone())
        else:
            self._watch()

    def _alone(self) -> list[Work]:
        """The requests that come next and whose owners read their prompts by themselves."""
        admitted = []
        requests = self._requests
        with self._changed:
            while (work := requests.next()) is not None and self._placement.of(work) == "one":
                requests.begin(work, self.tokenizer, self._placement.spread_short(work))
                work.reading = {answer.rank for answer in work.answers}
                admitted.append(work)
        return admitted

    def _job(self, **job: Any) -> None:
        news = self._requests.news()
        self._sequences.follow(news)
        nothing: dict[str, Any] = {"prompt": None, "pauses": [], "alone": [], "move": None}
        nothing["beside"] = []
        # a short prompt is read in one pass: its first token does not wait for those that follow
        self._is_long = any(
            work.reading and work.prompt_tokens > EXACT_TOKENS for work in self._admission.running
        )
        self._send_job(**{"do": "round", "long": self._is_long} | nothing | news | job)

    def _step(self, alone: list[Work]) -> None:
        """A round in which every rank decodes, and some begin to read prompts by themselves, or go
        on to; several rounds where this rank does."""
        moving, self._moving = self._moving, None
        if moving is not None and moving[0].state == "over":
            moving = None
        prompts = self._begin_round(alone, None if moving is None else asdict(moving[1]))
        self._problem = None if moving is None else self._move(*moving)
        with reporting(self.engine):
            self._read_alone(prompts)
            self._sequences.run_round(self._is_long, self._go_on)
            self._end_round()
        if moving is not None:
            self._have_moved(*moving, self._problem)

    def _begin_round(self, alone: list[Work], move: dict[str, Any] | None = None) -> list[Prompt]:
        prompts = [work.prompt(self._ends) for work in alone]
        self._job(alone=[asdict(prompt) for prompt in prompts], move=move)
        return prompts

    def _read_alone(self, prompts: list[Prompt]) -> None:
        for prompt in prompts:
            if 0 in prompt.places:
                self._sequences.read_alone(prompt)

    def _end_round(self) -> None:
        self._problem = self._collect() or self._problem
        self._just_read = self._overdue = False
        self._beaten = time.monotonic()

    def _go_on(self) -> None:
        """In the middle of a prompt that this rank reads: one round ends, the next begins."""
        self._end_round()
        self._requests.expire()
        if self._ended:
            self._requests.end_all(NotReady(CLOSING))
        prompts = self._begin_round(self._alone())
        self.engine.mesh.begin()
        self._read_alone(prompts)

    def _move(self, work: Work, move: Move) -> str | None:
        """Other ranks take answers; why that has failed, or None."""
        for index, _ in move.drawn:
            work.answers[index].rank = move.prompt.places[index]
        start = time.perf_counter()
        try:
            self._sequences.move(move)
        except CallEnded as error:
            return str(error)
        self.answer_costs.record_shared(work.prompt_tokens, time.perf_counter() - start)
        for rank in move.ranks:
            work.coded_tokens[rank] = self._sequences.kept.num_coded(move.prompt.number, rank)
        return None

    def _have_moved(self, work: Work, move: Move, problem: str | None) -> None:
        if problem is not None:
            self._requests.prompts.lose(move.prompt.number)
            self._requests.fail(work, problem)

    def _read(self, work: Work) -> None:
        """A round in which all ranks read one prompt, with pauses for everybody else."""
        answers, patience = self._requests.answers, LEAST_PATIENCE * self.engine.mesh.timeout
        course = self._placement.course(work, answers.values(), patience)
        others = bool(answers)
        with self._changed:
            self._requests.begin(work, self.tokenizer)
            self._requests.reading = work
        prompt = work.prompt(self._ends)
        self._job(prompt=asdict(prompt), pauses=course.pauses, beside=course.beside)
        begun = time.monotonic() - work.arrived
        problem = self._read_prompt(work, prompt, course)
        with reporting(self.engine):
            problem = self._collect(work) or problem
        self._just_read, self._overdue, self._beaten = True, others, time.monotonic()
        work.spans += [
            Span(rank, name, begun + a, begun + b)
            for rank, spans in self._spans.items()
            for name, a, b in spans
        ]
        if problem is not None:
            self._requests.prompts.forget(prompt.number)
            self._requests.fail(work, problem)
        else:
            if others and course.pauses:
                paused = max(course.paused, course.stepped)
                self.costs.record_pause(paused / len(course.pauses))
            self._have_read(work, course)

    def _have_read(self, work: Work, course: Course) -> None:
        """All ranks have read a prompt."""
        number, ids = work.answers[0].number, work.request.prompt_ids
        if self._sequences.kept.possible:
            self._requests.prompts.add(number, ids, work.owner)
        if work.base is None:
            busy = max((busy_seconds(spans) for spans in self._spans.values()), default=None)
            if course.is_even:
                self.costs.record_together(work.prompt_tokens, course.seconds, busy)
                self.costs.record_ends(*course.ends())
            elif busy is not None:
                self.costs.record_uneven(work.prompt_tokens, busy, course.beside)
        if self._may_move(work):
            patience = LEAST_PATIENCE * self.engine.mesh.timeout
            move = self._placement.move(work, self._ends, patience)
            self._moving = None if move is None else (work, move)

    def _may_move(self, work: Work) -> bool:
        """Whether other ranks can go on with answers to a prompt that all have just read."""
        if work.state == "over" or work.request.n == 1:
            return False
        if work.prompt_tokens > self._requests.prompts.room:
            return False
        return self._sequences.kept.may_be_shared(work.answers[0].number)

    def _read_prompt(self, work: Work, prompt: Prompt, course: Course) -> str | None:
        """Why the ranks have not read the prompt, or None."""

        def between(block: int) -> None:
            self._progress = block / course.blocks
            with course.pausing(block):
                if block in course.pauses:
                    course.stepped += self._pause()
            if work.cancelled:
                self.engine.cancel()

        within = None
        if work.deadline is not None:
            left = 1e3 * (work.deadline - time.monotonic())
            within = min(max(1e-3, left), LONGEST_MS)
        course.begin()
        try:
            cache = self._sequences.read_together(prompt, between, within, course.beside)
            work.coded_tokens[work.owner] = self._num_coded(prompt)
            problem = self._lacking(work) if self.engine.degraded else None
            if problem is not None:
                return problem
            if cache is not None:
                self._sequences.answer(prompt, cache)
            return None
        except (CallEnded, ValueError) as error:
            return str(error)
        finally:
            course.stop()
            with self._changed:
                self._requests.reading, self._progress = None, None

    def _lacking(self, work: Work) -> str | None:
        """The answers lack tokens of a device; why they are not given then, or None."""
        self._counts["degraded"] += not work.degraded
        work.degraded = True
        if work.request.degrade:
            return None
        problem = "a device was late or lost, and an answer without it was not asked for"
        self._requests.fail(work, problem)
        return problem

    def _num_coded(self, prompt: Prompt) -> int:
        """Of how many of its tokens the owner has codes alone."""
        if self._sequences.kept.possible:
            return self._sequences.kept.num_coded(prompt.number, prompt.owner)
        plan = self.engine.plan(len(prompt.ids))
        sources = plan.sources(plan.owner) if self.engine.codebook.coded else ()
        return sum(plan.num_received(plan.owner, source) for source in sources)

    def _pause(self) -> float:
        """Seconds for which the busiest rank has decoded."""
        mesh = self.engine.mesh
        with stage("pause"):
            self._sequences.step()
            self._collect()
            mesh.send(b"\1", block=Control.GO_ON, plan=0, to=peers_of(mesh))
            self._job_sent = time.monotonic()
        self._requests.expire()
        return self._busiest

    def _collect(self, work: Work | None = None) -> str | None:
        """The tokens of this round, of all ranks; why the prompt of `work`, which all ranks were to
        read, has no answers, or None."""
        report, problem = self._sequences.report(), None
        self._sequences.confirm()
        self._spans, self._busiest = {0: report["spans"]}, float(report["busy"])
        self._note(0, report, len(report["tokens"]))
        self._requests.take_report(0, report)
        for rank, report in enumerate(self._reports(), 1):
            problem = report["problem"] or problem
            if work is not None and report.get("degraded"):
                problem = self._lacking(work) or problem
            self._spans[rank] = report["spans"]
            self._busiest = max(self._busiest, report["busy"])
            self._note(rank, report, len(report["tokens"]))
            self._requests.take_report(rank, report)
        return problem
