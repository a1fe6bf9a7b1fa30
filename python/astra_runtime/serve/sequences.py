"""The sequences of one rank: prompts that it reads, answers that it decodes, all in one pass.

A prompt is read by all ranks together, or by this one alone, a piece in each step. A step takes one
token of every answer that this rank decodes; what it drew stays in the report until the leader has
confirmed it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..engine import Engine
from ..models import num_logits_of, vocabulary_of
from ..sessions.cache import KeyValues
from ..trace import trace_of, tracing
from .batch import Cache, read
from .kept import Kept
from .prompt import Move, Prompt
from .sampling import Sampler

# Of a step with a piece of a prompt: answers wait for their next tokens, half a second at most with
# what a round takes beside its step. The longer it is, the more rows the products of a piece have,
# and the fewer steps read the weights anew.
STEP_SECONDS = 0.43
NOTABLE = 1_000_000  # ns, of a wait in a timeline
FIRST_PIECE, LEAST_PIECE = 32, 8  # tokens


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


@dataclass(eq=False)
class _Reading:
    """A prompt that this rank reads by itself. `wanted`: which of its answers it then gives."""

    prompt: Prompt
    cache: Cache
    wanted: set[int]
    seconds: float = 0.0


class Sequences:
    """The answers that this rank decodes, and the prompts that it reads by itself.

    Args:
        engine: of a decoder with a language-model head.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.adapter = engine, engine.adapter
        self._answers: dict[int, _Answer] = {}
        self._ended: dict[int, Cache] = {}  # since the last job: the next one may keep them
        self._reading: list[_Reading] = []
        self._unreported: list[list[Any]] = []
        self._failed: list[list[Any]] = []
        self._read: list[list[Any]] = []
        self._piece = FIRST_PIECE
        self.kept = Kept(engine)
        self.spans: list[list[Any]] = []  # of the last prompt that all ranks have read
        self._busy = 0.0  # seconds of computing that were not reported
        self._stepped: list[Any] | None = None  # answers of the last step, and its seconds

    def __len__(self) -> int:
        return len(self._answers) + len(self._reading)

    def read_alone(self, prompt: Prompt) -> None:
        """Begins to read a prompt without the other ranks."""
        cache = Cache(KeyValues(len(self.adapter.blocks)))
        self._reading.append(_Reading(prompt, cache, set(prompt.indices(self.engine.rank))))

    def read_together(
        self, prompt: Prompt, between: Callable[[int], None], within_ms: float | None = None
    ) -> Cache | None:
        """Has all ranks read a prompt; collective. Its owner gets what it needs to go on."""
        with self._traced():
            return self._read_together(prompt, between, within_ms)

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
        self, prompt: Prompt, between: Callable[[int], None], within_ms: float | None
    ) -> Cache | None:
        number, owner = prompt.number, prompt.owner
        if self.kept.possible:
            return self.kept.read(number, prompt.ids, owner, prompt.base, between, within_ms)
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

    def step(self) -> None:
        """A token of every answer and a piece of the prompt that is read here, in one pass."""
        answers = list(self._answers.values())
        reading = self._reading[0] if self._reading else None
        caches = [answer.cache for answer in answers]
        new = [[answer.token] for answer in answers]
        if reading is not None:
            caches.append(reading.cache)
            new.append(self._next_piece(reading))
        if not new:
            return
        begun = time.perf_counter()
        with torch.no_grad():
            read(self.engine, caches, [torch.tensor([ids]).to(self.adapter.device) for ids in new])
        seconds = time.perf_counter() - begun
        self._busy += seconds
        if reading is None:
            self._stepped = [len(answers), round(seconds, 6)]
        for answer in answers:
            self._draw(answer)
        if reading is not None:
            self._have_read(reading, len(new[-1]), seconds, len(answers))

    def _next_piece(self, reading: _Reading) -> list[int]:
        """Pieces of a prompt are about as long as each other: in a short last one, this rank would
        wait for the steps of the others."""
        rest = reading.prompt.ids[reading.cache.length :]
        pieces = math.ceil(len(rest) / self._piece)
        return list(rest[: math.ceil(len(rest) / pieces)])

    def _have_read(self, reading: _Reading, tokens: int, seconds: float, others: int) -> None:
        """A piece of a prompt, in a step of so many seconds with `others` tokens of answers."""
        prompt, cache = reading.prompt, reading.cache
        reading.seconds += seconds * tokens / (tokens + others)
        if 2 * tokens > self._piece:  # a shorter one says little of a whole one
            ideal = tokens * STEP_SECONDS / max(seconds, 1e-6)
            self._piece = int(min(max(ideal, self._piece / 2, LEAST_PIECE), 2 * self._piece))
        if cache.length == len(prompt.ids):
            self._reading.remove(reading)
            self._read.append([prompt.number, reading.seconds])
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
        """What the leader has not confirmed to have heard: tokens, failures, prompts read."""
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
