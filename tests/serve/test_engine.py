"""OpenAI's client, the HTTP server, a leader with a worker, and a tiny model, all at once."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from astra_runtime.serve.running import RunningService, Started
from tests.runtime.models import tiny
from tests.runtime.serve.service import alone, led
from tests.runtime.serve.test_encoding import encoding, png
from tests.serve.fakes import byte_tokenizer, serving

openai = pytest.importorskip("openai")

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", vocab_size=len(byte_tokenizer()))


@pytest.fixture(scope="module")
def running(model: Any) -> Iterator[tuple[RunningService, str]]:
    tokenizer = byte_tokenizer()
    with led(model, 2) as leader:
        leader.tokenizer = tokenizer
        started = Started(leader, tokenizer, lambda: None)
        service = RunningService("tiny", "decoder", leader.context_length, lambda _: started)
        with serving(service) as url:
            yield service, url
        service.close()


@pytest.fixture(scope="module")
def client(running: tuple[RunningService, str]) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{running[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: Any, prompt: str, **more: Any) -> Any:
    asked = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": NEW_TOKENS}
    return client.completions.create(**asked | more)


def expected(model: Any, prompt: str) -> str:
    """What one device continues the prompt with, in text."""
    tokenizer = byte_tokenizer()
    ids = alone(model, tokenizer(prompt)["input_ids"], NEW_TOKENS)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("prompt", ["Once upon a time", "x" * 150], ids=["short", "long"])
def test_the_answer_is_one_devices(client: Any, model: Any, prompt: str) -> None:
    text = expected(model, prompt)
    assert complete(client, prompt).choices[0].text == text
    pieces = [chunk.choices[0].text for chunk in complete(client, prompt, stream=True)]
    assert "".join(pieces) == text


def test_a_stop_text_that_several_tokens_make(client: Any, model: Any) -> None:
    text = expected(model, "Once")
    place = next(i for i in range(3, len(text)) if text.find(text[i : i + 3]) == i)
    stop = text[place : place + 3]
    for stream in (False, True):
        answer = complete(client, "Once", stop=[stop, "never there"], stream=stream)
        parts = list(answer) if stream else [answer]
        assert "".join(part.choices[0].text for part in parts) == text[:place]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_seeds_and_several_answers(client: Any) -> None:
    def drawn(seed: int, n: int = 1) -> list[str]:
        answer = complete(client, "Once", temperature=1.5, seed=seed, n=n)
        return [choice.text for choice in answer.choices]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(3, n=3))) == 3


def test_logprobs_name_the_likeliest(client: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == 5
    for token in content:
        likeliest = token.top_logprobs
        assert (likeliest[0].bytes, likeliest[0].logprob) == (token.bytes, token.logprob)
        assert likeliest[0].logprob >= likeliest[1].logprob >= likeliest[2].logprob


def test_to_close_a_stream_ends_the_work(client: Any, running: Any) -> None:
    stream = complete(client, "Once", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 60
    while running[0].status().running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_many_at_once_are_each_as_alone(running: Any, model: Any) -> None:
    prompts = [f"{number} and so on" for number in range(3)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running[1]}/v1", api_key="none") as client:
            answers = await asyncio.gather(*(complete(client, prompt) for prompt in prompts))
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask()) == [expected(model, prompt) for prompt in prompts]


def test_what_the_service_refuses_is_named(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        complete(client, "Once", max_tokens=300)
    assert told.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as told:
        complete(client, "Once", logit_bias={"99999": 1})
    assert told.value.param == "logit_bias"


@contextlib.contextmanager
def asked(model: Any, kind: Any) -> Iterator[Any]:
    """A client of a service of one rank that embeds or classifies."""
    tokenizer = byte_tokenizer()
    with encoding(model, 1) as leader:
        started = Started(leader, tokenizer, lambda: None)
        service = RunningService("tiny", kind, leader.context_length, lambda _: started)
        with serving(service) as url:
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        service.close()


def test_embeddings_are_the_models() -> None:
    model = tiny("bert", vocab_size=len(byte_tokenizer()))
    with asked(model, "encoder") as client:
        answer = client.embeddings.create(model="tiny", input=["Hello", "world!"])
        client.close()
    ids = torch.tensor([byte_tokenizer()("world!")["input_ids"]])
    with torch.no_grad():
        pooled = model(input_ids=ids).last_hidden_state[0].mean(0)
    vector = torch.tensor(answer.data[1].embedding)
    torch.testing.assert_close(vector, F.normalize(pooled, dim=0), atol=1e-5, rtol=1e-4)
    assert answer.usage.prompt_tokens == len("Helloworld!")


def test_images_are_classified() -> None:
    image = base64.b64encode(png()).decode()
    with asked(tiny("vit", num_labels=5), "vision") as client:

        def classify(*images: str) -> Any:
            body = {"model": "tiny", "image": [*images], "top_k": 3}
            return client.post("/images/classify", body=body, cast_to=dict[str, Any])

        first, second = classify(image, f"data:image/png;base64,{image}")["data"]
        assert first["labels"] == second["labels"]
        assert len(first["labels"]) == 3
        scores = [label["score"] for label in first["labels"]]
        assert scores == sorted(scores, reverse=True)
        bomb = png_header(60_000, 60_000)
        for wrong in (b"no image", bomb):
            with pytest.raises(openai.BadRequestError) as told:
                classify(base64.b64encode(wrong).decode())
            assert told.value.param == "image"
        client.close()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that would fill the memory."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    crc = zlib.crc32(b"IHDR" + head)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", crc)


def test_a_question_in_the_page_is_answered(browser: Any, running: Any) -> None:
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(running[1])
    page.wait_for_selector("#state[data-ready=yes]")
    page.click("#settings summary")
    page.fill("#tokens", "12")
    page.fill("#question", "Hello")
    page.press("#question", "Enter")
    answer = page.locator(".turn.assistant:not(.waiting)")
    answer.wait_for()
    assert "12 tokens" in answer.locator(".note").inner_text()
    assert answer.locator(".words").text_content()
    page.close()
