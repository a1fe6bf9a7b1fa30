"""A request on its way through the leader, from its arrival to its last event."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import AstraError
from .checks import checked
from .prompt import Prompt
from .sampling import sampling_to_json
from .service import Done, Event, GenerationRequest, RequestRefused, Span, Token
from .text import TextStream

log = logging.getLogger("astra_runtime.serve")

Deliver = Callable[[Event | AstraError | None], None]  # None: the stream has ended


@dataclass(eq=False)
class Answer:
    """One answer of a request.

    Attributes:
        rank: that decodes it.
        ids: of its tokens reported so far.
    """

    number: int
    index: int
    rank: int
    work: Work
    text: TextStream
    ids: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(eq=False)
class Work:
    """A request, and what has become of it. Times are those of `time.monotonic`.

    Attributes:
        answer_bytes: of keys and values that each of its answers may take.
        owner: the rank that has its prompt read, and decodes its answers unless others help.
        base: a kept prompt that it goes on from, and how many tokens they share; None: none.
        reading: the ranks that are reading its prompt, each by itself.
        coded_tokens: of its prompt, those of which a rank has codes alone; by rank, 0 if it is not
            there.
    """

    request: GenerationRequest
    max_new_tokens: int
    deliver: Deliver
    arrived: float
    answer_bytes: int
    deadline: float | None = None
    state: Literal["queued", "running", "over"] = "queued"
    cancelled: bool = False
    owner: int = 0
    answers: list[Answer] = field(default_factory=list)
    admitted: float = 0.0
    first_token: float | None = None
    base: tuple[int, int] | None = None
    reading: set[int] = field(default_factory=set)
    coded_tokens: dict[int, int] = field(default_factory=dict)
    degraded: bool = False
    spans: list[Span] = field(default_factory=list)

    def timeline(self, now: float) -> list[Span]:
        """What the ranks did for it, in seconds from its arrival."""
        spans = list(self.spans)
        if self.admitted > self.arrived:
            spans.insert(0, Span(0, "queued", 0.0, self.admitted - self.arrived))
        if self.first_token is not None:
            first = self.first_token - self.arrived
            ranks = sorted({answer.rank for answer in self.answers})
            spans += [Span(rank, "decode", first, now - self.arrived) for rank in ranks]
        return spans

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    def begin(self, number: int, places: Sequence[int], tokenizer: Any, now: float) -> None:
        """It is admitted; its answers get numbers from `number` on, and their ranks."""
        self.state, self.admitted = "running", now
        self.answers = [
            Answer(number + index, index, rank, self, TextStream(tokenizer, self.request.stop))
            for index, rank in enumerate(places)
        ]

    def num_answers(self, rank: int) -> int:
        """How many of its answers `rank` decodes, or has decoded; 0 before it is admitted."""
        return sum(answer.rank == rank for answer in self.answers)

    @property
    def bytes(self) -> int:
        """Of keys and values that all its answers may take on one rank."""
        return self.answer_bytes * self.request.n

    @property
    def new_tokens(self) -> int:
        """Those of the prompt that have to be read."""
        return self.prompt_tokens - (0 if self.base is None else self.base[1])

    def prompt(self, ends: tuple[int, ...]) -> Prompt:
        """What the ranks have to know of it."""
        request = self.request
        return Prompt(
            self.answers[0].number,
            self.owner,
            list(request.prompt_ids),
            [answer.rank for answer in self.answers],
            self.max_new_tokens,
            list(ends),
            sampling_to_json(request.sampling),
            request.top_logprobs,
            self.base,
        )

    def send(self, event: Event | AstraError | None) -> None:
        """Hands out an event. A receiver that fails has its request cancelled, and no other."""
        try:
            self.deliver(event)
        except Exception as error:
            if not self.cancelled:
                log.warning("request %s: its receiver failed: %r", self.request.id, error)
            self.cancelled = True

    def add_token(self, answer: Answer, token: list[Any], now: float) -> bool:
        """A token of one answer; whether the answer is whole now.

        token: position, id, log-probability, alternatives, and why it is the last one, or "".
        """
        position, id, logprob, top, reason = token
        if answer.done or position != answer.tokens:
            return answer.done  # reported again, or behind a stop text
        answer.ids.append(id)
        if self.first_token is None:
            self.first_token = now
        if reason != "stop":
            piece = answer.text.add(id)
            pairs = tuple((other, value) for other, value in top)
            self.send(Token(answer.index, id, piece, logprob, pairs))
        if answer.text.stopped:
            reason = "stop"
        if reason:
            self._finish(answer, reason, now)
        return answer.done

    def _finish(self, answer: Answer, reason: Literal["stop", "length"], now: float) -> None:
        answer.done = True
        last = answer.text.finish()
        if answer.text.stopped:
            reason = "stop"
        first = now if self.first_token is None else self.first_token
        self.send(
            Done(
                answer.index,
                reason,
                last,
                self.prompt_tokens,
                answer.tokens,
                cached_tokens=0 if self.base is None else self.base[1],
                coded_tokens=self.coded_tokens.get(answer.rank, 0),
                degraded=self.degraded,
                rank=answer.rank,
                seconds_queued=self.admitted - self.arrived,
                seconds_to_first_token=first - self.arrived,
                seconds=now - self.arrived,
                timeline=self.timeline(now) if self.request.trace else (),
            )
        )

    @property
    def whole(self) -> bool:
        return all(answer.done for answer in self.answers)


@dataclass(frozen=True)
class Limits:
    """What a model can be asked.

    Attributes:
        context_length: tokens of a prompt and its answer together.
        vocabulary: how many token ids there are.
        token_bytes: of one token's keys and values.
        memory: bytes that the device with most room has for keys and values; 0: not known yet.
    """

    context_length: int
    vocabulary: int
    token_bytes: int
    memory: int = 0

    def work_of(self, request: GenerationRequest, deliver: Deliver) -> Work:
        """A request that can be queued, as of now. Raises RequestRefused where it cannot."""
        request = checked(request)
        self._check_ids("prompt", request.prompt_ids)
        self._check_ids("logit_bias", list(request.sampling.logit_bias))
        tokens, asked = len(request.prompt_ids), request.max_new_tokens
        if tokens < 1:
            raise RequestRefused("prompt", "expected at least one token, got an empty prompt")
        room = self.context_length - tokens + 1  # the last token is never read
        if room < 1 or (asked is not None and asked > room):
            raise RequestRefused(
                "messages",
                f"this model's context is {self.context_length} tokens, and the prompt has {tokens}"
                + ("" if asked is None else f", with {asked} more asked for"),
                "context_length_exceeded",
            )
        new_tokens = self._fitting(request, room) if asked is None else asked
        if new_tokens < 1:
            raise RequestRefused("max_tokens", f"expected at least 1, got {new_tokens}")
        now, within = time.monotonic(), request.within_s
        size = self.token_bytes * (tokens + new_tokens)
        deadline = None if within is None else now + within
        return Work(request, new_tokens, deliver, now, size, deadline)

    def _fitting(self, request: GenerationRequest, room: int) -> int:
        """As many new tokens as context and memory have room for, in each of the answers."""
        if not self.memory:
            return room
        tokens = self.memory // (self.token_bytes * max(1, request.n))
        return max(1, min(room, tokens - len(request.prompt_ids)))

    def _check_ids(self, param: str, ids: Sequence[int]) -> None:
        if not all(0 <= id < self.vocabulary for id in ids):
            raise RequestRefused(param, f"expected token ids from 0 to {self.vocabulary - 1}")
