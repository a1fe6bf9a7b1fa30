"""The sequences of one rank: prompts that it reads, answers that it decodes.

A prompt is read by all ranks together, or by this one alone, over some rounds. A step takes one
token of every answer that this rank decodes; what it drew stays in the report until the leader has
confirmed it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..costs import EXACT_TOKENS
from ..engine import Engine
from ..models import num_logits_of, vocabulary_of
from ..sessions.cache import KeyValues
from ..trace import trace_of, tracing
from .batch import Cache, read
from .costs import ROUND_SECONDS
from .kept import Kept
from .prompt import Move, Prompt
from .reading import MOST_ROWS, MOST_ROWS_BESIDE, Dropped, Pace, Reading
from .sampling import Sampler

NOTABLE = 1_000_000  # ns, of a wait in a timeline


@dataclass(eq=False)
class _Answer:
    """An answer that this rank decodes.

    Attributes:
        first: of its prompt's.
        token: drawn, and not read by the model yet.
    """

    number: int
    first: bool
    cache: Cache
    sampler: Sampler
    ends: frozenset[int]
    max_new_tokens: int
    token: int = 0
    drawn: int = 0


class Sequences:
    """The answers that this rank decodes, and the prompts that it reads by itself.

    Args:
        engine: of a decoder with a language-model head.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.adapter = engine, engine.adapter
        self._answers: dict[int, _Answer] = {}
        self._ended: dict[int, Cache] = {}  # since the last job: the next one may keep them
        self._reading: list[Reading] = []
        self._unreported: list[list[Any]] = []
        self._failed: list[list[Any]] = []
        self._read: list[list[Any]] = []
        self._pace = Pace(ROUND_SECONDS)
        self.kept = Kept(engine)
        self.spans: list[list[Any]] = []  # of the last prompt that all ranks have read
        self._busy = 0.0  # seconds of computing that were not reported
        self._stepped: list[Any] | None = None  # answers of the last step, and its seconds

    def __len__(self) -> int:
        return len(self._answers) + len(self._reading)

    def read_alone(self, prompt: Prompt) -> None:
        """Begins to read a prompt without the other ranks."""
        blocks = len(self.adapter.blocks)
        self._reading.append(Reading.of(prompt, self.engine.rank, blocks))

    def read_together(
        self,
        prompt: Prompt,
        between: Callable[[int], None],
        within_ms: float | None = None,
        beside: Sequence[float] = (),
    ) -> Cache | None:
        """Has all ranks read a prompt; collective. Its owner gets what it needs to go on.

        beside: by rank, what it decodes meanwhile, in tokens of a prompt. Prompts that are not kept
            are cut into equal shares of work all the same.
        """
        with self._traced():
            return self._read_together(prompt, between, within_ms, beside)

    @contextmanager
    def _traced(self) -> Iterator[None]:
        """What this rank does for a prompt goes into the next report."""
        trace = trace_of(self.adapter.device)
        start = trace.clock()
        try:
            with tracing(trace):
                yield
        finally:
            self.spans = notable(trace.spans, start, trace.clock())
            self._busy += busy_seconds(self.spans)

    def _read_together(
        self,
        prompt: Prompt,
        between: Callable[[int], None],
        within_ms: float | None,
        beside: Sequence[float],
    ) -> Cache | None:
        number, owner = prompt.number, prompt.owner
        if self.kept.possible:
            return self.kept.read(
                number, prompt.ids, owner, prompt.base, between, within_ms, beside
            )
        prefix = self.engine.prefill(
            torch.tensor([list(prompt.ids)]).to(self.adapter.device),
            owner=owner,
            request=number,
            within_ms=within_ms,
            between=between,
        )
        return None if prefix is None else Cache.of(prefix)

    def answer(self, prompt: Prompt, cache: Cache, wanted: Collection[int] | None = None) -> None:
        """Draws the first tokens behind a prompt that was read, of this rank's answers.

        wanted: their indices, where some are not any more; None: all are.
        """
        indices = prompt.indices(self.engine.rank) if wanted is None else sorted(wanted)
        for index in indices:
            last = index == indices[-1]
            self._draw(self._begin(prompt, index, cache if last else cache.fork()))

    def _begin(self, prompt: Prompt, index: int, cache: Cache) -> _Answer:
        number, ends = prompt.number + index, frozenset(prompt.ends)
        sampler, most = prompt.sampler(index), prompt.max_new_tokens
        answer = _Answer(number, index == 0, cache, sampler, ends, most)
        self._answers[number] = answer
        return answer

    def move(self, move: Move) -> None:
        """Other ranks go on with answers to a prompt that all ranks have read; collective.

        Each goes on as its owner would have done, but for what it knows as codes.
        """
        prompt, rank = move.prompt, self.engine.rank
        with self._traced():
            self.kept.share(prompt.number, move.ranks)
        num_logits = num_logits_of(self.adapter.model)
        for index, token in move.drawn:
            self._answers.pop(prompt.number + index, None)
            if prompt.places[index] == rank:
                answer = self._begin(prompt, index, self.kept.shared(prompt.number))
                answer.sampler.resume([token], num_logits)
                answer.token, answer.drawn = token, 1

    def drop(self, numbers: Sequence[int]) -> None:
        """Forgets answers, whether they were begun or not."""
        for number in numbers:
            self._answers.pop(number, None)
            for one in self._reading:
                one.wanted.discard(number - one.prompt.number)
        self._reading = [one for one in self._reading if one.wanted]

    def follow(self, job: dict[str, Any]) -> None:
        """What a job says of answers and kept prompts."""
        for number, owner, ids in job["keep"]:
            self.kept.keep(number, ids, owner, self._known(number))
        for number, owner, ids in job["grow"]:
            self.kept.grow(number, ids, owner, self._known(number))
        self.drop(job["drop"])
        self.kept.forget(job["forget"])
        self._ended.clear()

    def _known(self, number: int) -> KeyValues | None:
        """Keys and values of an answer that is given here, or has ended since the last job."""
        answer = self._answers.get(number)
        cache = self._ended.get(number) if answer is None else answer.cache
        return None if cache is None else cache.known()

    def run_round(self, is_long: bool, go_on: Callable[[], None]) -> None:
        """Reads of a prompt what there is time for, then draws a token of every answer.

        Args:
            is_long: whether another rank may read a prompt meanwhile, so that there is time for
                more than one token.
            go_on: called in the middle of a prompt, when this round is over: reports, and begins
                the next one.
        """
        self._pace.begin()
        reading = self._next_long()
        if reading is None or not self._read_alone(reading, go_on):
            self.step()
        while is_long and self._answers and self._pace.has_time(len(self._answers)):
            self.step()

    def _next_long(self) -> Reading | None:
        """The prompt that is read in a pass of its own."""
        return next((r for r in self._reading if len(r.prompt.ids) > EXACT_TOKENS), None)

    def _most_rows(self) -> int:
        return MOST_ROWS_BESIDE if self._answers else MOST_ROWS

    def _read_alone(self, reading: Reading, go_on: Callable[[], None]) -> bool:
        """Whether every answer has got a token in this round by then."""

        def between(block: int) -> None:
            seconds, due = self._pace.passed(block, len(self._answers))
            reading.seconds += seconds
            self._busy += seconds
            if due:
                self.step()
                go_on()
                self._pace.begin(in_pass=True)
                if reading not in self._reading:
                    raise Dropped

        self._pace.go_on()
        try:
            reading.read(self.engine, self._most_rows, between)
        except Dropped:
            return False
        seconds, _ = self._pace.passed(len(self.adapter.blocks), 0)
        self._busy += seconds
        if self._answers:
            self.step()
        self._have_read(reading, seconds)
        return True

    def step(self) -> None:
        """A token of every answer, and all of a short prompt, in one pass."""
        answers = list(self._answers.values())
        short = [r for r in self._reading if len(r.prompt.ids) <= EXACT_TOKENS][:1]
        caches = [answer.cache for answer in answers] + [one.cache for one in short]
        new = [[answer.token] for answer in answers] + [list(one.prompt.ids) for one in short]
        if not new:
            return
        begun = time.perf_counter()
        with torch.no_grad():
            read(self.engine, caches, [torch.tensor([ids]).to(self.adapter.device) for ids in new])
        seconds = time.perf_counter() - begun
        self._busy += seconds
        if not short:
            self._stepped = [len(answers), round(seconds, 6)]
            self._pace.stepped(len(answers), seconds)
        for answer in answers:
            self._draw(answer)
        for reading in short:
            tokens = len(reading.prompt.ids)
            self._have_read(reading, seconds * tokens / (tokens + len(answers)))

    def _have_read(self, reading: Reading, seconds: float) -> None:
        """All of a prompt is read, the last of it in so many seconds."""
        prompt, cache = reading.prompt, reading.cache
        self._reading.remove(reading)
        self._read.append([prompt.number, reading.seconds + seconds])
        if prompt.owner == self.engine.rank:
            self.kept.hold(prompt.number, cache.known())
        self.answer(prompt, cache, reading.wanted)

    def _draw(self, answer: _Answer) -> None:
        logits = answer.cache.logits
        assert logits is not None, "an answer's prompt was read"
        try:
            choice = answer.sampler.draw(logits)
            self._check_embedded(choice.token)
        except (ValueError, RuntimeError) as error:
            self._failed.append([answer.number, str(error)])
            del self._answers[answer.number]
            return
        answer.token, position = choice.token, answer.drawn
        answer.drawn += 1
        if choice.token in answer.ends:
            reason = "stop"
        else:
            reason = "length" if answer.drawn == answer.max_new_tokens else ""
        if reason:
            del self._answers[answer.number]
            if answer.first and self.kept.possible:
                self._ended[answer.number] = answer.cache
        self._unreported.append(
            [answer.number, position, choice.token, choice.logprob, choice.top, reason]
        )

    def _check_embedded(self, token: int) -> None:
        known = vocabulary_of(self.adapter.model)
        if token >= known:
            raise ValueError(
                f"token {token} was drawn, and the model has embeddings of 0 to {known - 1}"
            )

    def report(self) -> dict[str, Any]:
        """What the leader has not confirmed yet: tokens, failures, prompts read."""
        return {
            "tokens": list(self._unreported),
            "failed": list(self._failed),
            "read": list(self._read),
            "running": len(self),
            "spans": self.spans,
            "busy": round(self._busy, 6),
            "step": self._stepped,
        }

    def confirm(self) -> None:
        """The leader has the last report."""
        self._unreported.clear()
        self._failed.clear()
        self._read.clear()
        self.spans, self._busy, self._stepped = [], 0.0, None


def notable(spans: Sequence[Any], start: int, stop: int) -> list[list[Any]]:
    """What a rank did from `start` to `stop`, in ns: as a whole, and its longer waits and pauses.

    Each is a name, and seconds from `start` on.
    """
    long = [s for s in spans if s[0] in ("wait", "pause") and s[3] - s[2] >= NOTABLE]
    whole = [("compute", -1, start, stop), *sorted(long, key=lambda span: span[2])]
    return [
        [name, round((a - start) / 1e9, 4), round((b - start) / 1e9, 4)] for name, _, a, b in whole
    ]


def busy_seconds(spans: Sequence[Any]) -> float:
    """Seconds for which a rank computed, of its spans of a prompt."""
    return sum(stop - start if name == "compute" else start - stop for name, start, stop in spans)
