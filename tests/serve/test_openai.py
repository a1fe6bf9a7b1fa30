"""OpenAI's own Python client against a server on loopback."""

from __future__ import annotations

import base64
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest

from astra_runtime.serve.http.answers import Choice, TextShape, extras
from astra_runtime.serve.http.chat import TokenNames
from astra_runtime.serve.service import (
    Done,
    NotReady,
    QueueFull,
    RequestRefused,
    ServiceFailed,
    TimeIsUp,
    Token,
)
from tests.serve.fakes import FakeService, byte_tokenizer, serving

openai = pytest.importorskip("openai")

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeService, str]]:
    service = FakeService()
    with serving(service) as url:
        yield service, url


@pytest.fixture(scope="module")
def shared_client(shared: tuple[FakeService, str]) -> Iterator[Any]:
    """One for all tests: making a client takes half a second."""
    with openai.OpenAI(base_url=f"{shared[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def client(shared_client: Any, service: FakeService) -> Any:
    return shared_client


def chat(client: Any, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES} | more)


def test_chat(client: Any, service: FakeService) -> None:
    answer = chat(client, temperature=0, seed=7, stop="END", max_completion_tokens=40)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == service.text
    assert choice.finish_reason == "stop"
    prompt = "<|start|>user\nHello<|end|><|start|>assistant\n"
    asked = service.asked[0]
    assert service.tokenizer.decode(asked.prompt_ids) == prompt
    assert (asked.stop, asked.max_new_tokens, asked.sampling.seed) == (("END",), 40, 7)
    assert asked.sampling.temperature == 0
    usage = answer.usage
    assert usage.prompt_tokens == len(asked.prompt_ids)
    assert usage.completion_tokens == len(service.text.encode())
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2
    assert answer.astra["coded_tokens"] == usage.prompt_tokens // 4


def test_every_sampling_parameter_reaches_the_service(client: Any, service: FakeService) -> None:
    chat(
        client, top_p=0.5, presence_penalty=1, frequency_penalty=-1.5, logit_bias={"3": 5}, n=2,
        stop=["a", "b"], extra_body={"top_k": 9, "cache_prompt": False},
    )  # fmt: skip
    asked = service.asked[0]
    sampling = asked.sampling
    assert (sampling.top_p, sampling.top_k, sampling.temperature) == (0.5, 9, 1.0)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1.5)
    assert sampling.logit_bias == {3: 5}
    assert (asked.n, asked.stop, asked.fresh) == (2, ("a", "b"), True)
    assert asked.max_new_tokens is None  # as many as fit


def test_chat_stream(client: Any, service: FakeService) -> None:
    chunks = list(chat(client, stream=True, n=2, stream_options={"include_usage": True}))
    texts = ["", ""]
    reasons = [None, None]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [service.text] * 2
    assert reasons == ["stop", "stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2 * len(service.text.encode())


def test_stream_without_usage(client: Any) -> None:
    chunks = list(chat(client, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: Any, service: FakeService, stream: bool) -> None:
    answer = chat(client, logprobs=True, top_logprobs=1, stream=stream)
    parts = list(answer) if stream else [answer]
    choices = [choice for part in parts for choice in part.choices]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    # half characters are known by their bytes
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == service.text
    assert {token.logprob for token in tokens} == {-0.5}
    assert all([top.token for top in token.top_logprobs] == [token.token] for token in tokens)


def test_content_in_parts_and_the_developers_role(client: Any, service: FakeService) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}]
    chat(client, messages=messages)
    prompt = service.tokenizer.decode(service.asked[0].prompt_ids)
    assert "<|start|>system\nBe brief<|end|><|start|>user\none two<|end|>" in prompt


def test_completions(client: Any, service: FakeService) -> None:
    answer = client.completions.create(model="tiny", prompt="Once")
    assert answer.choices[0].text == service.text[:13]  # 16 bytes
    assert answer.choices[0].finish_reason == "length"
    assert service.asked[0].prompt_ids == service.tokenizer("Once")["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("ab", 1), (["ab", "c"], 2), ([64, 65], 1), ([[64, 65], [66]], 2)],
    ids=["string", "strings", "ids", "lists of ids"],
)
def test_prompts_of_every_kind(
    client: Any, service: FakeService, prompt: Any, prompts: int
) -> None:
    answer = client.completions.create(model="tiny", prompt=prompt, n=2)
    assert [choice.index for choice in answer.choices] == list(range(2 * prompts))
    assert len(service.asked) == prompts
    given = sum(len(asked.prompt_ids) for asked in service.asked)
    assert answer.usage.prompt_tokens == given


def test_prompts_are_answered_side_by_side(client: Any, service: FakeService) -> None:
    service.gate = threading.Event()
    answers: list[Any] = []

    def ask() -> None:
        answers.append(client.completions.create(model="tiny", prompt=["a", "b", "c"]))

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 60
    while len(service.asked) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    service.gate.set()
    asking.join(60)
    assert [choice.index for choice in answers[0].choices] == [0, 1, 2]
    service.endless, service.error, service.error_at = True, ServiceFailed("lost"), 4
    with pytest.raises(openai.InternalServerError, match="lost"):
        client.completions.create(model="tiny", prompt=["a", "b", "c"])
    assert service.cancelled.wait(60)


def test_completions_stream_and_logprobs(client: Any, service: FakeService) -> None:
    service.text = "abc"
    chunks = list(
        client.completions.create(model="tiny", prompt=["a", "b"], logprobs=2, stream=True)
    )
    texts = {0: "", 1: ""}
    offsets: dict[int, list[int]] = {0: [], 1: []}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert texts == {0: "abc", 1: "abc"}
    assert offsets == {0: [0, 1, 2], 1: [0, 1, 2]}
    whole = client.completions.create(model="tiny", prompt="a", logprobs=2).choices[0].logprobs
    assert whole.tokens == ["a", "b", "c"]
    assert whole.token_logprobs == [-0.5] * 3
    assert whole.text_offset == [0, 1, 2]
    assert [len(top) for top in whole.top_logprobs] == [2, 2, 2]


def test_parts_of_characters_have_names_of_their_own(client: Any, service: FakeService) -> None:
    """Among the likeliest tokens one would take the other's place otherwise."""
    service.text = "é"
    found = client.completions.create(model="tiny", prompt="a", logprobs=2).choices[0].logprobs
    assert found.tokens == ["bytes:\\xc3", "bytes:\\xa9"]
    assert found.top_logprobs[0] == {"bytes:\\xc3": -0.5, "bytes:\\xc2": -1.5}


def test_tokens_of_one_text_are_told_apart() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["éé"])  # in the tokenizer's alphabet these characters stand for bytes
    names = TokenNames(tokenizer)
    assert names.text(tokenizer.convert_tokens_to_ids("éé")) == "éé"
    with patch.object(names, "text", lambda _: "a"):
        top = TextShape("tiny", "1", names, 2)._top(Token(0, 5, "a", -0.5, ((5, -0.5), (6, -1.5))))
    assert top == {"a": -0.5, "token_id:6": -1.5}


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "astra"
    with pytest.raises(openai.NotFoundError) as told:
        client.models.retrieve("folder/other")
    assert told.value.code == "model_not_found"


def test_embeddings(client: Any, service: FakeService) -> None:
    service.kind = "encoder"
    # the official client asks for base64 unless it is told otherwise
    plain = client.embeddings.create(model="tiny", input=["ab", "c"], encoding_format="float")
    coded = client.embeddings.create(model="tiny", input=["ab", "c"])
    assert plain.data[0].embedding == [0.6, -0.8, 2.0]
    assert [each.embedding[2] for each in coded.data] == [2.0, 1.0]
    assert plain.usage.prompt_tokens == plain.usage.total_tokens == 3
    raw = client.embeddings.create(model="tiny", input="ab", encoding_format="base64")
    vector = struct.unpack("<3f", base64.b64decode(raw.data[0].embedding))
    assert vector == pytest.approx([0.6, -0.8, 2.0])
    with pytest.raises(openai.BadRequestError) as told:
        client.embeddings.create(model="tiny", input="x" * 600)
    assert told.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
        chat(client)


@pytest.mark.parametrize(
    ("error", "kind", "status", "code"),
    [
        (QueueFull(8, 2.5), openai.RateLimitError, 429, "rate_limit_exceeded"),
        (NotReady("rank 1 is away"), openai.InternalServerError, 503, "not_ready"),
        (ServiceFailed("rank 1 was lost"), openai.InternalServerError, 503, "service_failed"),
        (TimeIsUp("2 s are over"), openai.InternalServerError, 504, "timeout"),
        (RequestRefused("seed", "no"), openai.BadRequestError, 400, None),
        (KeyError("secret"), openai.InternalServerError, 500, "service_failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token(
    client: Any, service: FakeService, error: Any, kind: Any, status: int, code: Any, stream: bool
) -> None:
    service.error = error
    with pytest.raises(kind) as told:
        chat(client, stream=stream)
    assert (told.value.status_code, told.value.code) == (status, code)
    assert "secret" not in str(told.value)
    if status == 429:
        assert told.value.response.headers["retry-after"] == "3"
    if isinstance(error, RequestRefused):
        assert told.value.param == "seed"


def test_an_error_in_the_middle_of_a_stream_is_raised(client: Any, service: FakeService) -> None:
    service.error, service.error_at = ServiceFailed("rank 1 was lost"), 3
    stream = chat(client, stream=True)
    pieces = [next(stream).choices[0].delta.content for _ in range(3)]
    # the second letter has two bytes
    assert pieces == ["", "G", "r"]
    with pytest.raises(openai.APIError, match="rank 1 was lost"):
        next(stream)


def test_to_close_a_stream_cancels_the_request(client: Any, service: FakeService) -> None:
    service.endless = True
    stream = chat(client, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    assert not service.cancelled.is_set()
    stream.close()
    assert service.cancelled.wait(60)


def test_a_client_that_waits_no_longer_cancels_the_request(
    client: Any, service: FakeService
) -> None:
    service.gate = threading.Event()
    while not service.asked:  # on a busy machine the server may come to it too late
        with pytest.raises(openai.APITimeoutError):
            chat(client, timeout=0.3)
    assert service.cancelled.wait(60)


def test_while_it_loads_the_reason_is_told(client: Any, service: FakeService) -> None:
    ready = service.state
    service.state = type(ready)(False, "loading tiny")
    service.tokenizer = None
    with pytest.raises(openai.InternalServerError, match="loading tiny") as told:
        chat(client)
    assert told.value.status_code == 503
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_async_client_and_many_at_once(shared: Any, service: FakeService) -> None:
    import asyncio

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{shared[1]}/v1", api_key="none") as client:
            answers = await asyncio.gather(*(chat(client) for _ in range(8)))
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask()) == [service.text] * 8


def test_several_answers_take_as_long_as_the_slowest() -> None:
    done = [Done(0, "stop", "", 5, 9, rank=1, seconds=3.0), Done(1, "stop", "", 5, 2, seconds=1.0)]
    said = extras([Choice(each.index, done=each) for each in done])
    assert (said["seconds"], said["ranks"]) == (3.0, [1, 0])
