"""A service asked from an event loop: while it loads, while it answers, when it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest

from astra_runtime import Engine
from astra_runtime.errors import AstraError
from astra_runtime.serve.leader import Leader
from astra_runtime.serve.running import RunningService, Started
from astra_runtime.serve.service import Done, GenerationRequest, NotReady, RequestRefused, Token

from .service import GREEDY, Numbers, alone, prompt


class Starting:
    """Starts a service of one rank when it may."""

    def __init__(self, model: Any) -> None:
        self.model, self.may = model, threading.Event()
        self.closed = False

    def __call__(self, service: Any) -> Started:
        service.say("reading weights")
        while not self.may.wait(0.01):
            if service.closing.is_set():
                raise AstraError("closed before it was loaded")
        stack = contextlib.ExitStack()
        engine = stack.enter_context(Engine(self.model))
        leader = stack.enter_context(Leader(engine, Numbers()))
        leader.wait_ready(20)
        stack.callback(setattr, self, "closed", True)
        return Started(leader, Numbers(), stack.close)


def ready(service: RunningService) -> None:
    while not service.status().ready:
        assert service.failed is None


async def collect(service: RunningService, request: GenerationRequest) -> list[Any]:
    return [event async for event in service.generate(request)]


def test_it_answers_once_it_is_loaded(llama: Any) -> None:
    start = Starting(llama)
    service = RunningService("tiny", "decoder", 1 << 30, start, ["a", "b"])
    request = GenerationRequest("x", prompt(8), 5, GREEDY)
    while service.status().reason != "reading weights":
        pass
    assert [peer.state for peer in service.status().peers] == ["loading"] * 2
    assert service.context_length == 1 << 30  # nobody knows better yet
    with pytest.raises(NotReady, match="reading weights"):
        asyncio.run(collect(service, request))
    start.may.set()
    ready(service)
    assert service.context_length == 256
    events = asyncio.run(collect(service, request))
    assert [e.id for e in events if isinstance(e, Token)] == alone(llama, prompt(8), 5)
    assert isinstance(events[-1], Done)
    with pytest.raises(RequestRefused, match="does not embed"):
        asyncio.run(service.embed([[1]]))
    with pytest.raises(RequestRefused):
        asyncio.run(collect(service, GenerationRequest("x", [], 5)))
    service.close()
    assert start.closed
    with pytest.raises(NotReady, match="shutting down"):
        asyncio.run(collect(service, request))


def test_a_stream_that_is_closed_is_cancelled(llama: Any) -> None:
    async def some(service: RunningService) -> int:
        stream: Any = service.generate(GenerationRequest("x", prompt(8), 200, GREEDY))
        async for _ in stream:
            break
        await stream.aclose()
        while service.status().running:
            await asyncio.sleep(0.01)
        return 1

    start = Starting(llama)
    start.may.set()
    service = RunningService("tiny", "decoder", 256, start)
    ready(service)
    assert asyncio.run(some(service)) == 1
    service.close()


def test_closing_ends_the_loading() -> None:
    service = RunningService("tiny", "decoder", 256, Starting(None))
    service.close()
    assert "closed before" in str(service.failed)


def test_whoever_waits_for_the_loading_need_not_wait_for_ever() -> None:
    may = threading.Event()

    def start(service: Any) -> Started:
        may.wait()  # as a fit, which nothing interrupts
        raise AstraError("over")

    service = RunningService("tiny", "decoder", 256, start)
    assert not service.loading_ends(0.0)
    assert service.closing.is_set()
    may.set()
    assert service.loading_ends(20.0)
    service.close()
