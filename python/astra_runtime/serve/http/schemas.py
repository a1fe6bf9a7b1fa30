"""The parameters of each endpoint: taken, accepted without effect, or refused by name.

An `Endpoint` reads a body into checked values. What is out of range, of another type, or known and
not supported, is an `ApiError` that names the parameter. docs/serving.md has the same tables; a
test holds the two together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import expected, invalid

Read = Callable[[str, Any], Any]  # (name, value that is not null) -> checked value
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIAS = 1024
MAX_INPUTS = 2048


def parse_body(data: bytes) -> dict[str, Any]:
    """The JSON object in a request's body.

    NaN, infinities and numbers beyond a float's range are refused, as JSON has none.
    """
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        message = f"We could not parse the JSON body of your request: {error}"
        raise invalid(None, message) from None
    if not isinstance(body, dict):
        raise invalid(None, f"The body: expected a JSON object, got {type(body).__name__}")
    return body


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def number(low: float, high: float) -> Read:
    def read(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise expected(name, f"a number from {low:g} to {high:g}", value)
        if not low <= value <= high:
            raise expected(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    return read


def integer(low: int, high: int) -> Read:
    def read(name: str, value: Any) -> int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise expected(name, f"an integer from {low} to {high}", value)
        return int(value)

    return read


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise expected(name, "true or false", value)
    return value


def text(name: str, value: Any) -> str:
    """A string of Unicode characters: JSON's escapes can also make halves of them."""
    if not isinstance(value, str):
        raise expected(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise expected(name, "Unicode text, no half of a surrogate pair", value) from None
    return value


def anything(name: str, value: Any) -> Any:
    return value


def stops(name: str, value: Any) -> tuple[str, ...]:
    """One string, or a list of up to four, that end an answer."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or len(strings) > MAX_STOPS:
        raise expected(name, f"a string or a list of at most {MAX_STOPS} strings", value)
    for string in strings:
        if not 1 <= len(text(name, string)) <= MAX_STOP_CHARACTERS:
            raise expected(name, f"strings of 1 to {MAX_STOP_CHARACTERS} characters", string)
    return tuple(strings)


def logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise expected(name, f"an object of at most {MAX_LOGIT_BIAS} token ids", value)
    biases = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise expected(name, "token ids as names", token)
        biases[int(token)] = number(-100, 100)(f"{name}[{token}]", bias)
    return biases


def stream_options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise expected(name, "an object", value)
    known = ("include_usage", "include_obfuscation")
    given = {k: v for k, v in value.items() if k in known and v is not None}
    return {option: boolean(f"{name}.{option}", v) for option, v in given.items()}


def one_of(*values: str) -> Read:
    def read(name: str, value: Any) -> str:
        if value not in values:
            raise expected(name, " or ".join(repr(v) for v in values), value)
        return str(value)

    return read


def prompts(name: str, value: Any) -> list[str | list[int]]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    wanted = "a string, token ids, or a list of either"
    several = value if isinstance(value, list) else [value]
    if several and all(_is_id(item) for item in several):
        return [[int(item) for item in several]]  # one prompt; the context bounds its length
    if not 1 <= len(several) <= MAX_INPUTS:
        raise expected(name, f"1 to {MAX_INPUTS} inputs", value)
    read: list[str | list[int]] = []
    for number_, item in enumerate(several):
        place = f"{name}[{number_}]" if isinstance(value, list) else name
        if isinstance(item, str):
            read.append(text(place, item))
        elif isinstance(item, list) and item and all(_is_id(token) for token in item):
            read.append([int(token) for token in item])
        else:
            raise expected(place, wanted, item)
    return read


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def images(name: str, value: Any) -> list[str]:
    """One image or a list of them, each in base64, with or without `data:…;base64,` before it."""
    several = value if isinstance(value, list) else [value]
    if not 1 <= len(several) <= MAX_INPUTS:
        raise expected(name, f"1 to {MAX_INPUTS} images", value)
    return [text(f"{name}[{i}]", item) for i, item in enumerate(several)]


@dataclass(frozen=True)
class Endpoint:
    """One path's parameters.

    Attributes:
        required: names that must be there and not null.
        taken: name → how its value is read. Null is the same as absent.
        ignored: accepted, whatever they hold, without effect.
        refused: name → the values that ask for nothing, and so are accepted.
    """

    required: tuple[str, ...]
    taken: Mapping[str, Read]
    ignored: frozenset[str] = frozenset()
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def read(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The values that were given, checked, and the names that nobody knows."""
        for name in self.required:
            if body.get(name) is None:
                raise invalid(name, f"Missing required parameter: {name!r}")
        values: dict[str, Any] = {}
        unknown = []
        for name, value in body.items():
            if name in self.refused:
                self._check_refused(name, value)
            elif name not in self.taken:
                unknown += [] if name in self.ignored else [name]
            elif value is not None:
                values[name] = self.taken[name](name, value)
        return values, unknown

    def _check_refused(self, name: str, value: Any) -> None:
        if value is None or any(value == harmless for harmless in self.refused[name]):
            return
        harmless = self.refused[name]
        only = f"; only {' and '.join(map(json.dumps, harmless))} can be given" if harmless else ""
        raise invalid(name, f"{name} is not supported here{only}", "unsupported_parameter")


_TOKENS = integer(1, 1_000_000)
_SAMPLING: dict[str, Read] = {
    "model": text,
    "max_tokens": _TOKENS,
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(-1, 1_000_000),
    "seed": integer(-(2**63), 2**63 - 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": logit_bias,
    "stop": stops,
    "n": integer(1, 128),
    "stream": boolean,
    "stream_options": stream_options,
    "cache_prompt": boolean,
}
# That draw or end an answer otherwise, at vLLM and llama-server: none here is to pass for theirs.
_OTHERS: dict[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "grammar": ("",),
    "json_schema": (),
    "guided_json": (),
    "structured_outputs": (),
}
_IGNORED = frozenset({"user", "metadata", "store", "service_tier"})

CHAT = Endpoint(
    required=("model", "messages"),
    taken={
        **_SAMPLING,
        "messages": anything,  # chat.py reads them
        "max_completion_tokens": _TOKENS,
        "logprobs": boolean,
        "top_logprobs": integer(0, 20),
    },
    ignored=_IGNORED | {"parallel_tool_calls"},
    refused={
        **_OTHERS,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "echo": (False,),
        "suffix": (),
        "best_of": (1,),
    },
)
COMPLETIONS = Endpoint(
    required=("model", "prompt"),
    taken={**_SAMPLING, "prompt": prompts, "logprobs": integer(0, 5)},
    ignored=_IGNORED,
    refused={
        **_OTHERS,
        "echo": (False,),
        "suffix": ("",),
        "best_of": (1,),
        "tools": ([],),
        "response_format": ({"type": "text"},),
    },
)
EMBEDDINGS = Endpoint(
    required=("model", "input"),
    taken={"model": text, "input": prompts, "encoding_format": one_of("float", "base64")},
    ignored=_IGNORED,
    refused={"dimensions": ()},
)
CLASSIFY = Endpoint(
    required=("model", "image"),
    taken={"model": text, "image": images, "top_k": integer(1, 1000)},
    ignored=_IGNORED,
)


@dataclass(frozen=True)
class TextOptions:
    """What chat and completions ask for beside their prompt."""

    max_tokens: int | None
    stop: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool
    # None: no log probabilities; k: of the chosen token and of the k likeliest
    logprobs: int | None
    # False: the whole prompt is computed anew
    cached: bool


def text_options(values: Mapping[str, Any], most_choices: int) -> TextOptions:
    """The options in the values that CHAT or COMPLETIONS read, contradictions refused."""
    if "stream_options" in values and not values.get("stream"):
        raise invalid("stream_options", "stream_options: expected only together with stream: true")
    if values.get("n", 1) > most_choices:
        raise expected("n", f"at most {most_choices}", values["n"])
    usage = values.get("stream_options", {}).get("include_usage", False)
    return TextOptions(
        max_tokens=_max_tokens(values),
        stop=values.get("stop", ()),
        n=values.get("n", 1),
        stream=values.get("stream", False),
        include_usage=usage,
        logprobs=_logprobs(values),
        cached=values.get("cache_prompt", True),
    )


def _max_tokens(values: Mapping[str, Any]) -> int | None:
    given = {values[k] for k in ("max_tokens", "max_completion_tokens") if k in values}
    if len(given) > 1:
        message = "max_tokens and max_completion_tokens differ: expected one of them"
        raise invalid("max_tokens", message)
    return given.pop() if given else None


def _logprobs(values: Mapping[str, Any]) -> int | None:
    """Completions give a number; chat a switch, and the number beside it."""
    asked = values.get("logprobs")
    if asked is None or asked is False:
        if "top_logprobs" in values:
            raise invalid("top_logprobs", "top_logprobs: expected logprobs: true beside it")
        return None
    return int(values.get("top_logprobs", 0)) if asked is True else int(asked)
