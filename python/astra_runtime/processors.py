"""What is done to logits before a token is chosen, in Hugging Face's words and order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

DEFAULT_TOP_K = 50  # of `model.generate`


def processors(
    config: Any, tokens: int, model: nn.Module, ends: Sequence[int], padding: Tensor | None
) -> list[Any]:
    """In the order of `model.generate`; `padding`: tokens of it in front of each row."""
    from transformers.generation import logits_process as hf

    def value(name: str) -> Any:
        return getattr(config, name, None)

    last, device = list(ends) or None, str(next(model.parameters()).device)
    made: list[Any] = []
    if value("repetition_penalty") not in (None, 1.0):
        made.append(hf.RepetitionPenaltyLogitsProcessor(value("repetition_penalty"), padding))
    if value("no_repeat_ngram_size"):
        made.append(hf.NoRepeatNGramLogitsProcessor(value("no_repeat_ngram_size")))
    if value("bad_words_ids"):
        made.append(hf.NoBadWordsLogitsProcessor(value("bad_words_ids"), last))
    if value("min_new_tokens") and last is not None:
        made.append(
            hf.MinNewTokensLengthLogitsProcessor(
                tokens, value("min_new_tokens"), last, device=device
            )
        )
    if value("suppress_tokens"):
        made.append(hf.SuppressTokensLogitsProcessor(value("suppress_tokens"), device=device))
    return made


def with_own(made: Sequence[Any], own: Sequence[Any]) -> list[Any]:
    """The host's own processors stand behind those that were made, and in place of those of the
    same class."""
    kinds = {type(processor): processor for processor in own}
    merged = [kinds.get(type(processor), processor) for processor in made]
    return merged + [processor for processor in own if processor not in merged]


def warpers(config: Any) -> list[Any]:
    """What a draw does to the logits, behind all other processors."""
    from transformers.generation import logits_process as hf

    def value(name: str) -> Any:
        return getattr(config, name, None)

    made: list[Any] = []
    if value("temperature") not in (None, 1.0):
        made.append(hf.TemperatureLogitsWarper(value("temperature")))
    top_k = DEFAULT_TOP_K if value("top_k") is None else value("top_k")
    if top_k:
        made.append(hf.TopKLogitsWarper(top_k))
    if value("top_p") is not None and value("top_p") < 1:
        made.append(hf.TopPLogitsWarper(value("top_p")))
    if value("min_p") is not None:
        made.append(hf.MinPLogitsWarper(value("min_p")))
    if value("typical_p") is not None and value("typical_p") < 1:
        made.append(hf.TypicalLogitsWarper(value("typical_p")))
    return made


def warper(listed: Sequence[Any]) -> Callable[[Tensor, Tensor], Tensor]:
    def warp(ids: Tensor, logits: Tensor) -> Tensor:
        for processor in listed:
            logits = processor(ids, logits)
        return logits

    return warp


def _check_scores(scores: Any, batch: int) -> None:
    """Refuses what the host's processors may have made of the logits, of which the likeliest token
    would be just any."""
    if not isinstance(scores, Tensor):
        got = type(scores).__name__
    elif scores.dim() != 2 or len(scores) != batch or not scores.shape[1]:
        got = f"shape {list(scores.shape)}"
    elif not bool((scores.amax(-1) > -math.inf).all()):  # NaN counts as the largest
        got = "NaN, or no token that is left"
    else:
        return
    raise ValueError(f"logits_processor: expected scores of shape [{batch}, V], got {got}")


def chooser(listed: Sequence[Any], sample: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Draws as `model.generate` does, from torch's own generator."""

    warp = warper(listed)

    def choose(ids: Tensor, logits: Tensor) -> Tensor:
        batch, logits = len(logits), warp(ids, logits)
        _check_scores(logits, batch)
        if not sample:
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]

    return choose
