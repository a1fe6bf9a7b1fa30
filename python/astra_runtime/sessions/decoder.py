"""Decoding on one rank: any number of sessions in one batch, which they join and leave at will."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..decoding import Choose, end_tokens, next_token
from ..engine_parts import EngineParts
from ..errors import InvalidChoice, NotFinite, anew
from ..inputs import check_function, check_integer
from ..models import vocabulary_of
from ..turns import without_gradients
from .codes import complete
from .passes import read_tokens
from .state import SessionState


class Continued(Protocol):
    """A session."""

    _state: SessionState


@dataclass(frozen=True, eq=False)
class Asked:
    """What a session is to be continued with; see `Engine.generate`."""

    max_new_tokens: int
    ends: tuple[int, ...]
    choose: Choose | None = None

    @classmethod
    def of(
        cls,
        engine: EngineParts,
        max_new_tokens: Any,
        eos_token_id: Any,
        choose: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Asked:
        """The arguments, checked. ValueError, TypeError: not ones that any rank can use."""
        check_function("choose", choose)
        return cls(
            check_integer("max_new_tokens", max_new_tokens, 1),
            end_tokens(engine.model, eos_token_id, vocabulary_of(engine.model)),
            choose,
        )

    def check_room(self, tokens: int, limit: int) -> None:
        """Refuses more tokens than fit behind `tokens`, or none to go on behind."""
        if not tokens:
            raise ValueError("session: expected at least one token to go on behind, got none")
        if tokens + self.max_new_tokens - 1 > limit:
            raise ValueError(
                f"max_new_tokens: expected at most {max(0, limit - tokens + 1)} after {tokens} "
                f"tokens, as the model's limit is {limit}, got {self.max_new_tokens}"
            )


@dataclass(eq=False)
class Answer:
    """One session while this rank continues it.

    Attributes:
        tokens: the new tokens so far.
        done: nothing more will come: an end token, `max_new_tokens`, or an error.
        error: what `choose` has done wrong, or logits that are NaN; it concerns this answer alone.
        logits: fp32 [1, V], from which the last token was chosen; None before the first.
    """

    state: SessionState
    asked: Asked
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    error: InvalidChoice | NotFinite | None = None
    logits: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """int64 [1, T], the session's tokens and the new ones."""
        new = torch.tensor([self.tokens], dtype=torch.int64, device=self.state.ids.device)
        return torch.cat([self.state.ids, new.view(1, -1)], 1)


class Decoder:
    """Continues sessions on this rank. Nothing here uses the mesh, or waits for another rank.

    A step reads one token of each answer in one pass of the model: the products with its weights
    are of the whole batch, attention is each sequence's own. So nothing is padded, and an answer
    has the tokens that it would have alone, up to rounding. Whatever else is done with a session
    before `finish` drops the answer.

    Example:
        decoder = engine.decoder()
        answer = decoder.add(session, max_new_tokens=20)  # on `session.owner`
        while not answer.done:
            decoder.step()
        session.finish()  # on every rank
    """

    def __init__(self, engine: EngineParts) -> None:
        self._engine = engine
        self._answers: list[Answer] = []

    def __len__(self) -> int:
        """How many answers are not done yet."""
        return len(self._answers)

    def add(
        self,
        session: Continued,
        max_new_tokens: int = 20,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        choose: Choose | None = None,
    ) -> Answer:
        """Begins to continue a session that this rank owns; options as of `Engine.generate`.

        Raises:
            ValueError: another rank owns the session, or it is being continued already.
            ModelChanged: the model is another one by now.
        """
        state = getattr(session, "_state", None)
        if not isinstance(state, SessionState):
            raise TypeError(f"session: expected a session, got {type(session).__name__}")
        engine = self._engine
        engine._check_model()
        engine._check_unchanged()
        asked = Asked.of(engine, max_new_tokens, eos_token_id, choose)
        asked.check_room(state.tokens, int(engine.adapter.model.config.max_position_embeddings))
        if state.owner != engine.rank:
            raise ValueError(f"session: expected one of rank {engine.rank}, got {state.owner}'s")
        if state.answer is not None:
            raise ValueError("session: expected `finish` before it is continued again, got none")
        with without_gradients():
            complete(engine, state)
        return self.join(state, asked)

    def join(self, state: SessionState, asked: Asked) -> Answer:
        """As `add`, of a session's state, which has to be all there on this rank."""
        answer = Answer(state, asked)
        state.answer = answer
        if not state.fresh or state.scores is None:  # the last token is read here, maybe again
            state.cache.truncate(min(state.read, state.tokens - 1))
        self._answers.append(answer)
        return answer

    def remove(self, answer: Answer) -> None:
        """Ends an answer with the tokens that it has; `finish` its session afterwards."""
        answer.done = True
        self._answers = [other for other in self._answers if other is not answer]

    def step(self) -> list[Answer]:
        """One more token for each answer that is not done; returns these answers.

        The first token of a session that was just appended to costs nothing.
        """
        stepped = list(self._answers)
        with without_gradients():
            self._read(stepped)
            for answer in stepped:
                self._choose(answer)
        self._answers = [answer for answer in self._answers if not answer.done]
        return stepped

    def _read(self, answers: Sequence[Answer]) -> None:
        """Gives logits to all of them, in one pass."""
        reading = []
        for answer in answers:
            if not answer.tokens and answer.state.scores is not None:
                # a copy, as `choose` may write to it and forks share the scores
                answer.logits = answer.state.scores.clone()
            else:
                reading.append(answer)
        if reading:
            caches = [answer.state.cache for answer in reading]
            new = [answer.ids[:, answer.state.cache.length :] for answer in reading]
            for answer, row in zip(reading, read_tokens(self._engine, caches, new), strict=True):
                answer.logits = row[None]

    def _choose(self, answer: Answer) -> None:
        assert answer.logits is not None
        asked, engine = answer.asked, self._engine
        known = vocabulary_of(engine.model)
        try:
            chosen = next_token(engine.rank, answer.ids, answer.logits, asked.choose, known)
        except (InvalidChoice, NotFinite) as error:
            answer.error, answer.done = anew(error), True
            return
        token = int(chosen)
        answer.tokens.append(token)
        answer.done = token in asked.ends or len(answer.tokens) >= asked.max_new_tokens
