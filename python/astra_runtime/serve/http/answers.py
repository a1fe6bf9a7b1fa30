"""The shapes of answers: chat and text completions, whole and in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..service import Done, Token
from .chat import TokenNames


@dataclass
class Choice:
    """One answer as it comes; `last_token`: when its last token came, by the monotonic clock."""

    index: int
    pieces: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    characters: int = 0
    last_token: float | None = None
    done: Done | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, text: str) -> None:
        self.pieces.append(text)
        self.characters += len(text)


class Shape(ABC):
    """What chat and text completions have in common; the subclasses differ in a choice's form.

    Attributes:
        default_tokens: of an answer whose request says nothing of its length; None: as many as fit.
    """

    whole: str
    chunk: str
    prefix: str
    default_tokens: int | None = None

    def __init__(self, model: str, number: str, names: TokenNames | None, top: int | None) -> None:
        self.model, self.names, self.top = model, names, top
        self.id, self.created = f"{self.prefix}-{number}", int(time.time())

    def frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chunk before the first token; None: there is none."""
        return None

    @abstractmethod
    def piece(self, choice: Choice, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """A chunk of further text and the tokens that it is of."""

    @abstractmethod
    def closing(self, choice: Choice) -> dict[str, Any]:
        """The last chunk of a choice, with its finish reason."""

    @abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """A whole answer."""

    def last(self, choices: Sequence[Choice], prompts: Sequence[Done]) -> dict[str, Any]:
        """The chunk with the usage, behind all choices."""
        return self.frame(self.chunk, []) | {"usage": usage(choices, prompts)}

    def answer(self, choices: Sequence[Choice], prompts: Sequence[Done]) -> dict[str, Any]:
        whole = self.frame(self.whole, [self.choice(choice) for choice in choices])
        return whole | {"usage": usage(choices, prompts), "astra": extras(choices)}


class ChatShape(Shape):
    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more
        return self.frame(self.chunk, [choice])

    def opening(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, choice: Choice, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self._chunk(choice.index, {"content": text}, logprobs=self._logprobs(tokens))

    def closing(self, choice: Choice) -> dict[str, Any]:
        assert choice.done is not None
        chunk = self._chunk(choice.index, {}, finish_reason=choice.done.finish_reason)
        return chunk | {"astra": extras([choice])}

    def choice(self, choice: Choice) -> dict[str, Any]:
        assert choice.done is not None
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.done.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.names is None:
            return None
        content = [
            self._entry(token.id, token.logprob)
            | {"top_logprobs": [self._entry(*top) for top in token.top[: self.top]]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        assert self.names is not None
        data = self.names.data(token)
        return {
            "token": data.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(data),
        }


class TextShape(Shape):
    whole, chunk, prefix = "text_completion", "text_completion", "cmpl"
    default_tokens = 16

    def _choice(self, index: int, text: str, **more: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None} | more

    def piece(self, choice: Choice, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        logprobs = self._logprobs(tokens, choice.characters - len(text))
        return self.frame(self.chunk, [self._choice(choice.index, text, logprobs=logprobs)])

    def closing(self, choice: Choice) -> dict[str, Any]:
        assert choice.done is not None
        last = self._choice(choice.index, "", finish_reason=choice.done.finish_reason)
        return self.frame(self.chunk, [last]) | {"astra": extras([choice])}

    def choice(self, choice: Choice) -> dict[str, Any]:
        assert choice.done is not None
        logprobs = self._logprobs(choice.tokens, 0)
        reason = choice.done.finish_reason
        return self._choice(choice.index, choice.text, logprobs=logprobs, finish_reason=reason)

    def _logprobs(self, tokens: Sequence[Token], start: int) -> dict[str, Any] | None:
        """`text_offset` counts the characters of the continuation before each token."""
        if self.names is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(start)
            start += len(token.text)
        return {
            "tokens": [self.names.text(token.id) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float]:
        assert self.names is not None
        named: dict[str, float] = {}
        likeliest = [(token.id, token.logprob), *token.top[: self.top]]
        for number, (other, logprob) in enumerate(likeliest):
            if number and other == token.id:
                continue
            name = self.names.text(other)
            # another token of the same text, such as a byte's own beside its character's
            named[f"token_id:{other}" if name in named else name] = _finite(logprob)
        return dict(sorted(named.items(), key=lambda entry: -entry[1]))


def _finite(logprob: float | None) -> float:
    """The reference's number for what is very unlikely stands for −inf, which JSON has not."""
    return max(-9999.0, -9999.0 if logprob is None else logprob)


def usage(choices: Sequence[Choice], prompts: Sequence[Done]) -> dict[str, Any]:
    """Counts of tokens; `prompts`: one answer's figures for each prompt."""
    prompt = sum(done.prompt_tokens for done in prompts)
    new = sum(choice.done.completion_tokens for choice in choices if choice.done)
    cached = sum(done.cached_tokens for done in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def extras(choices: Sequence[Choice]) -> dict[str, Any]:
    """What the reference has no field for: who answered, from what, and how long it took."""
    done = [choice.done for choice in choices if choice.done]
    return {
        "ranks": [each.rank for each in done],
        "coded_tokens": max(each.coded_tokens for each in done),
        "degraded": any(each.degraded for each in done),
        "seconds_queued": done[0].seconds_queued,
        "seconds_to_first_token": done[0].seconds_to_first_token,
        "seconds": max(each.seconds for each in done),
    }
