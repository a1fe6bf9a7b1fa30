"""Drawing the next token, on the rank that decodes: seeded, and the same on every rank."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .service import Sampling

SMALL = 1e-5  # temperatures below are as good as 0, but for tokens that are as likely
LEAST = 1e-30  # by which a difference of fp32 scores can be divided
LARGEST = 1e30  # that is added to a score, which stays finite


@dataclass(frozen=True)
class Choice:
    """A drawn token, its log-probability and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


class Sampler:
    """Draws the tokens of one answer.

    Args:
        sampling: see `Sampling`; a seed of None is drawn here.
        offset: added to the seed, so that several answers to one prompt differ.
        top_logprobs: as of `GenerationRequest`.

    Example:
        >>> Sampler(Sampling(temperature=0)).draw(torch.tensor([0.0, 2.0, 1.0])).token
        1
    """

    def __init__(
        self, sampling: Sampling, offset: int = 0, top_logprobs: int | None = None
    ) -> None:
        self.sampling, self.top_logprobs = sampling, top_logprobs
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed + offset
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        self._counts: Counter[int] = Counter()

    def draw(self, logits: Tensor) -> Choice:
        """The next token after fp32 `logits` [V], which are left as they are.

        Raises ValueError where they hold NaN, or where logit_bias is of a token that they lack or
        leaves none: no token can be drawn.
        """
        if not bool(torch.isfinite(logits.max())):
            raise ValueError("the model's logits are not finite")
        scores = self._penalized(logits)
        if not bool(torch.isfinite(scores.max())):
            raise ValueError("logit_bias: expected one that leaves a token, got −inf for all")
        if self.sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            token = self._sampled(self._tempered(scores))
        self._counts[token] += 1
        if self.top_logprobs is None:
            return Choice(token)
        log_probabilities = torch.log_softmax(logits, -1)
        values, ids = log_probabilities.topk(min(self.top_logprobs, len(logits)))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        return Choice(token, float(log_probabilities[token]), top)

    def resume(self, tokens: Sequence[int], num_logits: int) -> None:
        """Goes on as if it had drawn `tokens`, each of so many, which another rank has."""
        for token in tokens:
            if self.sampling.temperature:
                # how far the generator goes depends on the number of scores alone
                self._sampled(torch.zeros(num_logits, dtype=torch.float32))
            self._counts[token] += 1

    def _penalized(self, logits: Tensor) -> Tensor:
        asked = self.sampling
        changes = {int(token): float(bias) for token, bias in asked.logit_bias.items()}
        if asked.presence_penalty or asked.frequency_penalty:
            for token, count in self._counts.items():
                penalty = asked.presence_penalty + asked.frequency_penalty * count
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return logits
        if max(changes) >= len(logits):
            raise ValueError(
                f"logit_bias: expected tokens that the model's head knows, 0 to {len(logits) - 1}, "
                f"got {max(changes)}"
            )
        index = torch.tensor(list(changes), device=logits.device)
        bounded = [min(change, LARGEST) for change in changes.values()]
        values = torch.tensor(bounded, dtype=logits.dtype, device=logits.device)
        return logits.index_add(0, index, values)

    def _tempered(self, scores: Tensor) -> Tensor:
        temperature = self.sampling.temperature
        if temperature < SMALL:  # quotients would be infinite, of which softmax makes NaN
            scores, temperature = scores - scores.max(), max(temperature, LEAST)
        return scores / temperature

    def _sampled(self, scores: Tensor) -> int:
        asked, ids = self.sampling, None
        if asked.top_k is not None and asked.top_k < len(scores):
            scores, ids = scores.topk(asked.top_k)
        probabilities = torch.softmax(scores, -1)
        if asked.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            beyond = ordered.cumsum(0) - ordered >= asked.top_p  # by the likelier tokens alone
            beyond[0] = False
            probabilities = torch.zeros_like(probabilities).index_copy(
                0, order, ordered.masked_fill(beyond, 0.0)
            )
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=self._generator)
        return int(drawn if ids is None else ids.cpu()[drawn])


def sampling_to_json(sampling: Sampling) -> dict[str, Any]:
    """What `sampling_from_json` reads; JSON has no integers as keys."""
    return vars(sampling) | {"logit_bias": [[t, b] for t, b in sampling.logit_bias.items()]}


def sampling_from_json(fields: dict[str, Any]) -> Sampling:
    bias = {int(token): float(value) for token, value in fields["logit_bias"]}
    return Sampling(**fields | {"logit_bias": bias})
