"""Whatever is sent: an error in the reference's format, which is never the server's own."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from astra_runtime.serve.http import HttpOptions, make_app
from astra_runtime.serve.http.connection import _event
from bench.service import malformed
from tests.serve.fakes import FakeService, byte_tokenizer

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"model": "tiny", "prompt": "Hello"}
VECTOR = {"model": "tiny", "input": "Hello"}
IMAGE = {"model": "tiny", "image": "aGVsbG8="}
PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/chat/completions": ("decoder", CHAT),
    "/v1/completions": ("decoder", TEXT),
    "/v1/embeddings": ("encoder", VECTOR),
    "/v1/images/classify": ("vision", IMAGE),
}
JSON = {"content-type": "application/json"}


async def ask(
    service: FakeService, method: str, path: str, content: bytes = b"", headers: Any = JSON,
    options: HttpOptions | None = None,
) -> httpx.Response:  # fmt: skip
    transport = httpx.ASGITransport(make_app(service, options), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, path, content=content, headers=headers)


def refused(answer: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The error of an answer, which has the reference's fields and no others."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert len(error["message"]) < 1000
    assert error["param"] == param
    return error


def post(path: str, body: Any, **changes: Any) -> httpx.Response:
    kind, _ = PATHS[path]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(ask(FakeService(kind), "POST", path, content, **changes))


CHAT_PATH, TEXT_PATH, VECTOR_PATH, IMAGE_PATH = PATHS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1), ("temperature", "hot"), ("temperature", True), ("top_p", -0.1),
        ("top_p", 1.5), ("top_k", 1.5), ("top_k", -2), ("seed", "7"), ("seed", 2**63), ("n", 0),
        ("n", 200), ("n", 17), ("max_tokens", 0), ("max_completion_tokens", -1),
        ("max_tokens", 10.5), ("presence_penalty", 3), ("frequency_penalty", -2.5),
        ("logit_bias", [1]), ("logit_bias", {"x": 1}), ("logit_bias", {"100000": 1}),
        ("stop", ["a"] * 5), ("stop", ""), ("stop", [1]), ("stop", "x" * 300), ("stream", "yes"),
        ("stream_options", {"include_usage": True}), ("logprobs", 3), ("top_logprobs", 21),
        ("top_logprobs", 3), ("messages", []), ("messages", "Hello"), ("messages", None),
        ("model", 7), ("model", None), ("cache_prompt", 1), ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("functions", [{}]), ("response_format", {"type": "json"}),
        ("modalities", ["audio"]), ("audio", {}), ("echo", True), ("suffix", "x"),
        ("best_of", 2), ("web_search_options", {}), ("min_p", 0.1), ("repetition_penalty", 1.2),
        ("ignore_eos", True), ("stop_token_ids", [2]), ("guided_json", {}),
    ],
)  # fmt: skip
def test_a_value_of_chat_is_refused_by_name(name: str, value: Any) -> None:
    refused(post(CHAT_PATH, CHAT | {name: value}), 400, name)


@pytest.mark.parametrize(
    ("message", "place"),
    [
        (7, ""),
        ({"role": "robot", "content": "x"}, ".role"),
        ({"content": "x"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": []}, ".content"),
        ({"role": "user", "content": "\ud800"}, ".content"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, ".content[0]"),
        ({"role": "user", "content": [{"type": ["text"]}]}, ".content[0].type"),
        ({"role": "tool", "content": "x"}, ""),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, ""),
    ],
)
def test_a_message_is_refused_by_its_place(message: Any, place: str) -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "x"}, message]}
    refused(post(CHAT_PATH, body), 400, f"messages[1]{place}")


@pytest.mark.parametrize(
    ("path", "name", "value", "param"),
    [
        (TEXT_PATH, "prompt", "", "prompt"),
        (TEXT_PATH, "prompt", [], "prompt"),
        (TEXT_PATH, "prompt", [1, "a"], "prompt[0]"),
        (TEXT_PATH, "prompt", [[1], [-1]], "prompt[1]"),
        (TEXT_PATH, "prompt", [[100_000]], "prompt"),
        (TEXT_PATH, "prompt", ["x"] * 17, "prompt"),
        (TEXT_PATH, "logprobs", True, "logprobs"),
        (TEXT_PATH, "logprobs", 6, "logprobs"),
        (TEXT_PATH, "echo", True, "echo"),
        (TEXT_PATH, "suffix", "end", "suffix"),
        (TEXT_PATH, "best_of", 3, "best_of"),
        (VECTOR_PATH, "input", "", "input"),
        (VECTOR_PATH, "input", [], "input"),
        (VECTOR_PATH, "input", {"text": "x"}, "input"),
        (VECTOR_PATH, "encoding_format", "hex", "encoding_format"),
        (VECTOR_PATH, "dimensions", 8, "dimensions"),
        (IMAGE_PATH, "image", "http://169.254.169.254/", "image[0]"),
        (IMAGE_PATH, "image", "data:image/png,plain", "image[0]"),
        (IMAGE_PATH, "image", 5, "image[0]"),
        (IMAGE_PATH, "top_k", 0, "top_k"),
    ],
)
def test_values_of_the_other_paths(path: str, name: str, value: Any, param: str) -> None:
    refused(post(path, PATHS[path][1] | {name: value}), 400, param)


@pytest.mark.parametrize("path", PATHS)
def test_another_model_is_not_found(path: str) -> None:
    error = refused(post(path, PATHS[path][1] | {"model": "gpt-4"}), 404, "model")
    assert error["code"] == "model_not_found"


def test_no_answer_repeats_megabytes() -> None:
    long = "x" * 1_000_000
    refused(post(CHAT_PATH, CHAT | {"model": long}), 404, "model")
    refused(post(CHAT_PATH, CHAT | {"seed": long}), 400, "seed")
    refused(asyncio.run(ask(FakeService(), "GET", f"/{long[:50_000]}")), 404)


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT_PATH, {"messages": [{"role": "user", "content": "x" * 600}]}),
        (CHAT_PATH, {"max_tokens": 500}),
        (TEXT_PATH, {"prompt": "x" * 600}),
        (TEXT_PATH, {"prompt": [[5] * 512]}),
        (TEXT_PATH, {"prompt": [5] * 2500}),
        (VECTOR_PATH, {"input": ["x", "y" * 600]}),
    ],
)
def test_what_does_not_fit_into_the_context(path: str, more: Any) -> None:
    param = {CHAT_PATH: "messages", TEXT_PATH: "prompt", VECTOR_PATH: "input"}[path]
    error = refused(post(path, PATHS[path][1] | more), 400, param)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in error["message"]


def test_a_limit_of_the_server_is_no_fault_of_who_names_no_length() -> None:
    """Nor is what a completion has by default where the context ends sooner."""
    service, options = FakeService(), HttpOptions(max_new_tokens=5)
    for path, body in ((TEXT_PATH, TEXT), (CHAT_PATH, CHAT)):
        content = json.dumps(body).encode()
        assert asyncio.run(ask(service, "POST", path, content, options=options)).is_success
    full = json.dumps(TEXT | {"prompt": [[5] * 509]}).encode()
    assert asyncio.run(ask(service, "POST", TEXT_PATH, full)).is_success
    assert [asked.max_new_tokens for asked in service.asked] == [5, 5, 3]
    for name in ("max_tokens", "max_completion_tokens"):
        refused(post(CHAT_PATH, CHAT | {name: 6}, options=options), 400, name)


def test_an_embedding_has_a_time_limit() -> None:
    service, options = FakeService("encoder"), HttpOptions(request_timeout_s=1e-3)

    async def embed(texts: Any) -> Any:
        await asyncio.Event().wait()

    service.embed = embed
    content = json.dumps(VECTOR).encode()
    answer = asyncio.run(ask(service, "POST", VECTOR_PATH, content, options=options))
    assert refused(answer, 504)["code"] == "timeout"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000,
        b'{"model": "tiny", "temperature": 1e999}', b"1" * 5000, b'{"a": Infinity}', b"{}x",
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    refused(post(CHAT_PATH, body), 400, "model" if body == b"{}" else None)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "", "application/jsonx"])
def test_a_body_that_a_web_page_could_send_is_refused(kind: str) -> None:
    refused(post(CHAT_PATH, CHAT, headers={"content-type": kind}), 415)


def test_a_body_that_is_too_large() -> None:
    options = HttpOptions(max_body=1000)
    body = json.dumps(CHAT | {"user": "x" * 1000}).encode()
    refused(post(CHAT_PATH, body, options=options), 413)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404), ("POST", "/v2/chat/completions", 404),
        ("GET", "/v1/models/", 404), ("GET", "/console.jsx", 404), ("POST", "/v1/models", 405),
        ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models/tiny", 405),
        ("OPTIONS", "/v1/chat/completions", 405), ("PUT", "/", 405), ("BREW", "/health", 405),
    ],
)  # fmt: skip
def test_other_paths_and_methods(method: str, path: str, status: int) -> None:
    answer = asyncio.run(ask(FakeService(), method, path))
    param = "model" if path.startswith("/v1/models/") and status == 404 else None
    refused(answer, status, param)
    assert status == 404 or "GET" in answer.headers["allow"] or "POST" in answer.headers["allow"]


def test_a_template_that_refuses_a_conversation() -> None:
    roles = ["user", "system"]
    body = CHAT | {"messages": [{"role": role, "content": "x"} for role in roles]}
    error = refused(post(CHAT_PATH, body), 400, "messages")
    assert "system comes first" in error["message"]


def test_a_model_without_a_template_completes_texts_only() -> None:
    service = FakeService()
    service.tokenizer = byte_tokenizer(template=None)
    answer = asyncio.run(ask(service, "POST", CHAT_PATH, json.dumps(CHAT).encode()))
    assert refused(answer, 400, "model")["code"] == "unsupported_endpoint"
    answer = asyncio.run(ask(service, "POST", TEXT_PATH, json.dumps(TEXT).encode()))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "more",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "echo": False},
        {"temperature": None, "stop": None, "n": None, "stream": None, "tools": None},
        {"reasoning_effort": "low", "anything": {"else": 1}},
        {"max_tokens": 7, "max_completion_tokens": 7},
        {"min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False, "stop_token_ids": []},
    ],
)
def test_what_asks_for_nothing_is_accepted(more: Any) -> None:
    assert post(CHAT_PATH, CHAT | more).status_code == 200


NAMES = [name for name in malformed.NAMES if name != "stream"]


def request(random_: random.Random) -> tuple[str, bytes]:
    """A request with a few values out of place, or bytes out of place."""
    path = random_.choice(list(PATHS))
    body = dict(PATHS[path][1])
    for name in random_.choices(NAMES, k=random_.randint(1, 3)):
        body[name] = random_.choice(malformed.JUNK)
    content = json.dumps(body).encode()
    if random_.random() < 0.3:
        cut = random_.randrange(len(content))
        content = content[:cut] + random_.randbytes(random_.randint(0, 8)) + content[cut + 1 :]
    return path, content


def test_a_thousand_malformed_requests() -> None:
    random_ = random.Random(0)
    services = {kind: FakeService(kind) for kind in ("decoder", "encoder", "vision")}
    seen: dict[int, int] = {}

    async def run() -> None:
        clients = {}
        for kind, service in services.items():
            transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
            clients[kind] = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        for _ in range(1000):
            path, content = request(random_)
            answer = await clients[PATHS[path][0]].post(path, content=content, headers=JSON)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            if answer.status_code != 200:
                refused(answer, answer.status_code, answer.json()["error"]["param"])

    asyncio.run(run())
    assert set(seen) <= {200, 400, 404}, seen
    assert seen[400] > 500, seen


def test_an_event_is_one_line_whatever_a_client_takes_for_a_line_break() -> None:
    content = {"text": "a\x0b\x1c\x85\u2028\u2029\r\nb"}
    lines = _event(content).decode().splitlines()
    assert lines[1:] == [""]
    assert json.loads(lines[0].removeprefix("data: ")) == content
