"""What a request of a host's own code may hold: numbers and ids as JSON has them, or a refusal.

A leader's jobs cross as JSON, and what fails there ends the mesh for everybody. So whatever stands
for an integer or a number is made one here, numpy's and torch's too, and everything else refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any, TypeVar

from .service import GenerationRequest, RequestRefused, Sampling

T = TypeVar("T")


def checked(request: GenerationRequest) -> GenerationRequest:
    """The request in plain numbers.

    Raises:
        RequestRefused: what is of another type, or nothing that a token can be drawn with.
    """
    if not isinstance(request, GenerationRequest):
        raise _refused("request", "GenerationRequest", request)
    plain = replace(
        request,
        prompt_ids=token_ids("prompt", request.prompt_ids),
        max_new_tokens=_optional(_integer, "max_tokens", request.max_new_tokens),
        sampling=_sampling(request.sampling),
        stop=_texts("stop", request.stop),
        n=_integer("n", request.n),
        top_logprobs=_optional(_integer, "top_logprobs", request.top_logprobs),
        within_s=_optional(_number, "within_s", request.within_s),
    )
    asked, most = plain.sampling, math.inf
    _check_range("n", plain.n, 1, most)
    _check_range("top_logprobs", plain.top_logprobs, 0, 20)
    _check_range("temperature", asked.temperature, 0, most)
    _check_range("top_p", asked.top_p, 0, 1)
    _check_range("top_k", asked.top_k, 1, most)
    if plain.within_s is not None and not plain.within_s > 0:
        raise RequestRefused("within_s", f"within_s: expected above 0, got {plain.within_s}")
    for name in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(value := getattr(asked, name)):
            raise RequestRefused(name, f"{name}: expected a finite number, got {value}")
    for token, bias in asked.logit_bias.items():
        if not bias < most:
            raise RequestRefused(
                "logit_bias", f"logit_bias[{token}]: expected a number, got {bias}"
            )
    return plain


def token_ids(param: str, ids: Any) -> list[int]:
    """Integers of whatever holds some: a list, an array, a tensor [T]."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise _refused(param, "token ids", ids)
    return [_integer(param, token) for token in ids]


def _sampling(asked: Any) -> Sampling:
    if not isinstance(asked, Sampling):
        raise _refused("sampling", "Sampling", asked)
    if not isinstance(asked.logit_bias, Mapping):
        raise _refused(
            "logit_bias", "token ids and what is added to their logits", asked.logit_bias
        )
    numbers = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    bias = {
        _integer("logit_bias", token): _number("logit_bias", value)
        for token, value in asked.logit_bias.items()
    }
    return Sampling(
        top_k=_optional(_integer, "top_k", asked.top_k),
        seed=_optional(_integer, "seed", asked.seed),
        logit_bias=bias,
        **{name: _number(name, getattr(asked, name)) for name in numbers},
    )


def _texts(param: str, texts: Any) -> tuple[str, ...]:
    """One text alone is one."""
    several = (texts,) if isinstance(texts, str) else texts
    if not isinstance(several, Iterable) or isinstance(several, bytes):
        raise _refused(param, "texts", texts)
    found = tuple(several)
    for text in found:
        if not isinstance(text, str):
            raise _refused(param, "texts", text)
    return found


def _integer(param: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise _refused(param, "an integer", value) from None


def _number(param: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refused(param, "a number", value)
    return float(value)


def _optional(read: Callable[[str, Any], T], param: str, value: Any) -> T | None:
    return None if value is None else read(param, value)


def _check_range(param: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise RequestRefused(param, f"{param}: expected {wanted}, got {value}")


def _refused(param: str, expected: str, got: Any) -> RequestRefused:
    return RequestRefused(param, f"{param}: expected {expected}, got {got!r:.60}")
