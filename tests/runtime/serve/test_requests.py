"""Requests as they are submitted: what is refused, and what ends one request alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from astra_runtime import Engine
from astra_runtime.serve.leader import Leader
from astra_runtime.serve.service import (
    Embedding,
    GenerationRequest,
    RequestRefused,
    Sampling,
    ServiceFailed,
    Token,
)

from .service import GREEDY, alone, ask, led, prompt


def test_what_is_asked_and_answered_can_be_in_sets() -> None:
    """They are frozen, and compare; of numbers in lists and dictionaries the hash says nothing."""
    asked = Sampling(seed=1, logit_bias={3: 1.0})
    for one, twin, other in (
        (asked, Sampling(seed=1, logit_bias={3: 1.0}), Sampling(seed=1)),
        (
            GenerationRequest("a", [1, 2], sampling=asked),
            GenerationRequest("a", [1, 2], sampling=asked),
            GenerationRequest("a", [1, 3], sampling=asked),
        ),
        (Token(0, 1, "a", 0.5, [(1, 0.5)]), Token(0, 1, "a", 0.5, [(1, 0.5)]), Token(0, 1, "a")),
        (Embedding([0.6, 0.8], 1), Embedding([0.6, 0.8], 1), Embedding([0.8, 0.6], 1)),
    ):
        assert len({one, twin, other}) == 2


@pytest.fixture(scope="module")
def one_rank(llama: Any) -> Any:
    with led(llama, 1) as leader:
        yield leader


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"ids": []}, "prompt", None),
        ({"ids": [97]}, "prompt", None),
        ({"ids": prompt(200), "new_tokens": 60}, "messages", "context_length_exceeded"),
        ({"ids": prompt(300), "new_tokens": None}, "messages", "context_length_exceeded"),
        ({"ids": [1], "new_tokens": 0}, "max_tokens", None),
        ({"ids": [1], "sampling": Sampling(logit_bias={97: 1.0})}, "logit_bias", None),
        ({"ids": [1], "sampling": Sampling(logit_bias={7: math.inf})}, "logit_bias", None),
        ({"ids": [1], "sampling": Sampling(temperature=-1)}, "temperature", None),
        ({"ids": [1], "sampling": Sampling(top_p=math.nan)}, "top_p", None),
        ({"ids": [1], "sampling": Sampling(top_k=0)}, "top_k", None),
        ({"ids": [1], "n": 0}, "n", None),
        ({"ids": [1], "top_logprobs": 21}, "top_logprobs", None),
        ({"ids": [1.0]}, "prompt", None),
        ({"ids": "text"}, "prompt", None),
        ({"ids": torch.zeros(1, 2, dtype=torch.int64)}, "prompt", None),
        ({"ids": [1], "new_tokens": 2.5}, "max_tokens", None),
        ({"ids": [1], "n": 1.5}, "n", None),
        ({"ids": [1], "stop": [5]}, "stop", None),
        ({"ids": [1], "within_s": math.nan}, "within_s", None),
        ({"ids": [1], "sampling": {"temperature": 0}}, "sampling", None),
        ({"ids": [1], "sampling": Sampling(temperature=torch.ones(2))}, "temperature", None),
        ({"ids": [1], "sampling": Sampling(seed=1.5)}, "seed", None),
        ({"ids": [1], "sampling": Sampling(logit_bias=[(1, 2)])}, "logit_bias", None),
        ({"ids": [1], "sampling": Sampling(presence_penalty=math.nan)}, "presence_penalty", None),
    ],
)
def test_what_no_rank_can_answer_is_refused(
    one_rank: Leader, asked: dict[str, Any], param: str, code: str | None
) -> None:
    with pytest.raises(RequestRefused) as refused:
        ask(one_rank, **asked)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_numbers_of_numpy_and_torch_are_numbers(llama: Any) -> None:
    """They cannot cross as JSON: one such request ended the mesh for everybody."""
    ids = prompt(150)
    sampling = Sampling(temperature=np.float32(0), seed=np.int64(3), logit_bias={np.int64(5): 0})
    asked: dict[str, Any] = {"sampling": sampling, "within_s": math.inf, "top_logprobs": np.int8(1)}
    with led(llama, 2) as leader:
        for given in (torch.tensor(ids), np.array(ids)):
            heard = ask(leader, given, np.int64(4), fresh=True, **asked).wait()
            assert heard.ids() == alone(llama, ids, 4)
        assert leader.status().lost == 0


def test_arguments_of_other_types(llama: Any, one_rank: Leader) -> None:
    with pytest.raises(RequestRefused, match="request: expected GenerationRequest"):
        one_rank.submit({"prompt_ids": [1]}, print)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="deliver: expected a function"):
        one_rank.submit(GenerationRequest("x", [1], 2), None)  # type: ignore[arg-type]
    with Engine(llama) as engine:
        for name, value in (("max_queue", "4"), ("memory", 0)):
            with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
                Leader(engine, None, **{name: value})


def test_one_stop_text_is_no_list_of_characters(one_rank: Leader, llama: Any) -> None:
    expected = alone(llama, prompt(20), 8)
    heard = ask(one_rank, prompt(20), 8, stop=f" {expected[3]} ").wait()
    assert "".join(event.text for event in heard.events) == " ".join(map(str, expected[:3]))


def test_a_text_that_cannot_be_made_ends_one_request(
    one_rank: Leader, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a token that the tokenizer does not have; the others went with the mesh."""
    first = alone(llama, prompt(20), 1)[0]

    def decode(ids: list[int], **_: Any) -> str:
        if first in ids:
            raise KeyError(first)
        return ""

    monkeypatch.setattr(one_rank.tokenizer, "decode", decode)
    broken, sound = ask(one_rank, prompt(20)), ask(one_rank, prompt(9), 3)
    assert isinstance(broken.wait().error(), ServiceFailed)
    assert f"its text: KeyError: {first}" in str(broken.error())
    assert sound.wait().ids() == alone(llama, prompt(9), 3)


def test_a_stream_ends_with_its_iterator(one_rank: Leader) -> None:
    stream: Any = one_rank.stream(GenerationRequest("x", prompt(4), None, GREEDY))
    next(stream)
    stream.close()
    heard = ask(one_rank, prompt(4), 3).wait()
    assert heard.done().completion_tokens == 3
