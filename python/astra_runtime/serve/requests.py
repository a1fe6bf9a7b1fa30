"""The requests of a leader that generates, from their arrival to their last events.

The leader has the ranks work in rounds; what it has been asked for, and what the ranks report of
it, is kept here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from ..costs import EXACT_TOKENS
from ..engine import Engine
from ..errors import AstraError
from .admission import Admission
from .costs import AnswerCosts, PromptCosts
from .kept import Prompts
from .service import ServiceFailed, Span, TimeIsUp
from .work import Answer, Work


class Requests:
    """What waits, what runs, and the prompts that the ranks keep afterwards.

    Args:
        engine: rank 0's; its call is cancelled with the request that all ranks read.
        admission: the queue, and what each rank has taken on.
        costs, answer_costs: learn from what the ranks report.
        keeps: whether prompts are kept.
        changed: guards what other threads than the leader's see; notified when a request ends.

    Attributes:
        answers: that are not whole, by number.
        prompts: that the ranks keep.
        reading: the request whose prompt all ranks read; None: there is none.
        timeline: of the request that ended last.
    """

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        costs: PromptCosts,
        answer_costs: AnswerCosts,
        keeps: bool,
        changed: threading.Condition,
    ) -> None:
        self._engine, self._keeps = engine, keeps
        self._changed = changed
        self.admission, self.costs, self.answer_costs = admission, costs, answer_costs
        self.answers: dict[int, Answer] = {}
        self.prompts = Prompts(0)
        self.reading: Work | None = None
        self.timeline: list[Span] = []
        self._drop: list[int] = []  # answers that their owners have to forget
        self._number = 0

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or is worked on."""
        return bool(len(self.admission) or self.admission.running)

    @property
    def is_active(self) -> bool:
        """Whether the ranks have something to decode or to forget."""
        return bool(self.answers or self._drop)

    def begin_mesh(self, room: int) -> None:
        """The ranks know nothing of earlier answers and prompts; `room`: tokens of prompts kept."""
        self.answers.clear()
        self._drop.clear()
        self.prompts = Prompts(room)

    def next(self) -> Work | None:
        """The request that comes next, with its owner: the rank that knows its beginning, unless
        that is busier than others."""
        work = self.admission.next()
        if work is None:
            return None
        known = None if work.request.fresh else self.prompts.find(work.request.prompt_ids)
        work.base = None if known is None else known[:2]
        if known is not None and self.admission.may_own(work, known[2]):
            work.owner = known[2]
        return work

    def begin(self, work: Work, tokenizer: Any, places: Sequence[int] | None = None) -> None:
        """What `next` gave is worked on.

        places: by answer, the rank that decodes it; None: its owner.
        """
        self.admission.admit(work)
        places = [work.owner] * work.request.n if places is None else places
        work.begin(self._number, places, tokenizer, time.monotonic())
        self._number += work.request.n
        self.answers |= {answer.number: answer for answer in work.answers}

    def news(self) -> dict[str, Any]:
        """What the ranks have to be told of answers and prompts since the last time, as jobs carry
        it."""
        with self._changed:
            news = {"drop": self._drop, **self.prompts.changes()}
            self._drop = []
        return news

    def take_report(self, rank: int, report: dict[str, Any]) -> None:
        """Takes a rank's report: tokens, prompts that it has read, answers that have failed."""
        now = time.monotonic()
        if report["step"]:
            self.answer_costs.record_step(*report["step"])
        for number, seconds in report["read"]:
            self._take_read(rank, number, seconds, now)
        for number, *token in report["tokens"]:
            if number in self.answers:
                self._take_token(self.answers[number], token, now)
        for number, reason in report["failed"]:
            if number in self.answers:
                self.end(self.answers[number].work, ServiceFailed(reason))

    def _take_token(self, answer: Answer, token: list[Any], now: float) -> None:
        try:
            whole = answer.work.add_token(answer, token, now)
        except Exception as error:  # the host's tokenizer has no text for it, say
            problem = f"its text: {type(error).__name__}: {error}"
            self.end(answer.work, ServiceFailed(problem))
            return
        if not whole:
            return
        del self.answers[answer.number]
        self.answer_costs.record_answer(answer.tokens)
        self._keep_answer(answer)
        if not token[-1]:  # its owner does not know
            with self._changed:
                self._drop.append(answer.number)
        if answer.work.whole:
            self.end(answer.work, None)

    def _take_read(self, rank: int, number: int, seconds: float, now: float) -> None:
        """A rank has read a prompt by itself; its owner keeps what is known of it until it is
        told."""
        work = next((w for w in self.admission.running if w.answers[0].number == number), None)
        if work is None:
            self.prompts.forget(number)
            return
        work.reading.discard(rank)
        work.spans.append(Span(rank, "compute", work.admitted - work.arrived, now - work.arrived))
        if rank != work.owner:
            return
        self.costs.record_by_one(work.prompt_tokens, seconds)
        if self._keeps and work.prompt_tokens > EXACT_TOKENS:
            self.prompts.add_alone(number, work.request.prompt_ids, work.owner)
        else:
            self.prompts.forget(number)

    def _keep_answer(self, answer: Answer) -> None:
        """A kept prompt goes on with its first answer, all of it that the model has read: the next
        question of a conversation begins with both."""
        number, work, new = answer.number, answer.work, answer.ids[:-1]
        if answer.index or not new or not self._keeps:
            return
        whole = [*work.request.prompt_ids, *new]
        kept = self.prompts.extend(number, new) is not None
        if not kept and work.base is None and work.prompt_tokens <= EXACT_TOKENS < len(whole):
            self.prompts.add_alone(number, whole, work.owner)

    def cancel(self, work: Work) -> None:
        """Has it end within one block or one token; from any thread."""
        with self._changed:
            work.cancelled = True
            if self.reading is work:
                self._engine.cancel()
            self._changed.notify_all()

    def expire(self) -> None:
        """Ends what was cancelled, and what has no time left."""
        now = time.monotonic()
        for work in self._all():
            late = work.deadline is not None and now >= work.deadline
            if work is self.reading:
                if late or work.cancelled:
                    self._engine.cancel()
            elif work.cancelled:
                self.end(work, None)
            elif late:
                self.end(work, _time_is_up(work))

    def fail(self, work: Work, problem: str) -> None:
        """Ends a request whose call has ended early, for the reason that it is to be told."""
        if work.cancelled:
            self.end(work, None)
        elif work.deadline is not None and time.monotonic() >= work.deadline:
            self.end(work, _time_is_up(work))
        else:
            self.end(work, ServiceFailed(problem))

    def end_running(self, error: AstraError) -> None:
        for work in tuple(self.admission.running):
            self.end(work, error)

    def end_all(self, error: AstraError) -> None:
        for work in self._all():
            self.end(work, error)

    def _all(self) -> list[Work]:
        with self._changed:
            return [*self.admission.waiting(), *self.admission.running]

    def end(self, work: Work, error: AstraError | None) -> None:
        """The last event of a request."""
        with self._changed:
            if work.state == "over":
                return
            if work.state == "queued":
                self.admission.remove(work)
            else:
                self.admission.finish(work, time.monotonic() - work.admitted)
            work.state = "over"
            left = [answer.number for answer in work.answers if not answer.done]
            for number in left:
                self.answers.pop(number, None)
            self._drop += left
            self.timeline = work.timeline(time.monotonic())
            self._changed.notify_all()
        if error is not None:
            work.send(error)
        work.send(None)


def _time_is_up(work: Work) -> TimeIsUp:
    return TimeIsUp(f"not finished within {work.request.within_s:g} s")
