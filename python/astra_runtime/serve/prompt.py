"""A prompt and how to continue it, as the leader's jobs carry it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .sampling import Sampler, sampling_from_json


@dataclass(frozen=True)
class Prompt:
    """A prompt and how to continue it.

    Attributes:
        number: of the first answer; the others have the following ones.
        owner: the rank that has it read, and keeps it.
        ids: of the prompt.
        places: by answer, the rank that decodes it.
        ends: tokens that end an answer.
        sampling, top_logprobs, max_new_tokens: as of `GenerationRequest`.
        base: a kept prompt that it goes on from, and how many tokens they share; None: none.
    """

    number: int
    owner: int
    ids: Sequence[int]
    places: Sequence[int]
    max_new_tokens: int
    ends: Sequence[int]
    sampling: dict[str, Any]
    top_logprobs: int | None = None
    base: tuple[int, int] | None = None

    def sampler(self, index: int) -> Sampler:
        """That of answer `index`, which is the same on every rank."""
        return Sampler(sampling_from_json(self.sampling), index, self.top_logprobs)

    def indices(self, rank: int) -> list[int]:
        """The answers that `rank` decodes."""
        return [index for index, place in enumerate(self.places) if place == rank]


@dataclass(frozen=True)
class Move:
    """Answers whose first tokens the owner of a prompt has drawn, and other ranks go on with.

    Attributes:
        prompt: that all ranks have read; `places` are the new ones, `ids` are left out.
        drawn: index and first token of each answer that moves.
    """

    prompt: Prompt
    drawn: Sequence[Sequence[int]]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Move:
        return cls(Prompt(**fields["prompt"]), fields["drawn"])

    @property
    def ranks(self) -> set[int]:
        """Those that take answers."""
        return {self.prompt.places[index] for index, _ in self.drawn}
