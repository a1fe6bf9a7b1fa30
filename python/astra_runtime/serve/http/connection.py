"""A client's end of a request: its body, whether it is still there, events sent to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Send

from .errors import ApiError, unavailable
from .front import api_error
from .logs import Record

T = TypeVar("T")
SHUTTING_DOWN = "it is being shut down"
CLOSE = {"Connection": "close"}
# How long the rest of a body that is too large is read, so that the client reads the answer.
DISCARD_S = 1.0
# Those that JSON does not escape by itself.
_LINE_BREAKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # nginx would keep events back
    (b"x-accel-buffering", b"no"),
]


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The request's body of at most `most` bytes, if it comes within `seconds`.

    Raises:
        ApiError: 413, or 408. The connection is closed with the answer.
    """
    size = request.headers.get("content-length", "")
    if size.isdigit() and int(size) > most:
        if "expect" not in request.headers:
            await _discard(request)
        raise _too_large(most)
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(seconds):
            while more and len(body) <= most:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                more = message.get("more_body", False)
    except TimeoutError:
        text = f"The request's body did not come within {seconds:g} s"
        raise ApiError(408, text, code="timeout", headers=CLOSE) from None
    if len(body) > most:
        if more:
            await _discard(request)
        raise _too_large(most)
    return bytes(body)


def _too_large(most: int) -> ApiError:
    message = f"The request's body is too large: expected at most {most} bytes"
    return ApiError(413, message, code="request_too_large", headers=CLOSE)


async def _discard(request: Request) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while (await request.receive()).get("more_body", False):
                pass


class Ending:
    """Tells running answers that the server's time is up."""

    def __init__(self) -> None:
        self.draining = False
        self._over = asyncio.Event()

    def end_all(self) -> None:
        self._over.set()

    async def wait(self) -> None:
        await self._over.wait()


async def while_connected(receive: Receive, ending: Ending, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled when the client leaves, or the server ends.

    Raises:
        ClientDisconnect: the client has closed its connection.
        ApiError: 503, the server ends.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    over = asyncio.ensure_future(ending.wait())
    try:
        await asyncio.wait({task, gone, over}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect if gone.done() else unavailable(SHUTTING_DOWN)
    finally:
        for each in (task, gone, over):
            each.cancel()
        await asyncio.gather(task, gone, over, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """Server-sent events, one a chunk, as a response.

    The status line waits for the first chunk, so that an error before it has a status of its own;
    after `heartbeat` seconds without any, the answer begins, and comments keep it alive. An error
    in the middle is an event, after which the stream ends without "[DONE]".
    """

    def __init__(
        self, chunks: AsyncGenerator[Any], receive: Receive, ending: Ending, record: Record,
        heartbeat: float,
    ) -> None:  # fmt: skip
        self.chunks, self.receive, self.ending = chunks, receive, ending
        self.record, self.heartbeat = record, heartbeat
        self.started = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self.receive, self.ending, self._run(send))
        except Exception as error:
            if not self.started or isinstance(error, ClientDisconnect):
                raise
            answer = api_error(error)
            self.record.error = answer.summary()
            await self._send(send, _event(answer.content()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self, send: Send) -> None:
        async with contextlib.aclosing(_with_pauses(self.chunks, self.heartbeat)) as chunks:
            async for chunk in chunks:
                await self._send(send, b": waiting\n\n" if chunk is None else _event(chunk))
        await self._send(send, b"data: [DONE]\n\n")

    async def _send(self, send: Send, data: bytes) -> None:
        if not self.started:
            self.started = True
            start = {"type": "http.response.start", "status": 200, "headers": list(EVENT_HEADERS)}
            await send(start)
        await send({"type": "http.response.body", "body": data, "more_body": True})


def _event(content: Any) -> bytes:
    """Some clients take every line break of Unicode for the end of a line, so those are escaped."""
    text = json.dumps(content, ensure_ascii=False).translate(_LINE_BREAKS)
    return b"data: " + text.encode() + b"\n\n"


async def _with_pauses(chunks: AsyncGenerator[T], seconds: float) -> AsyncGenerator[T | None]:
    """The chunks, and None whenever so many seconds passed without one."""
    upcoming: asyncio.Future[T] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(_next(chunks))
            await asyncio.wait({upcoming}, timeout=seconds)
            if not upcoming.done():
                yield None
                continue
            done, upcoming = upcoming, None
            try:
                chunk = done.result()
            except StopAsyncIteration:
                return
            yield chunk
    finally:
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
        await chunks.aclose()


async def _next(chunks: AsyncGenerator[T]) -> T:
    return await anext(chunks)


async def merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """The items of several streams as they come, each with its stream's number.

    An error of one ends all; to close this closes them.
    """
    # None: a stream has ended
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()

    async def read(number: int, stream: AsyncGenerator[T]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    items.put_nowait((number, item))
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.ensure_future(read(*each)) for each in enumerate(streams)]
    left = len(tasks)
    try:
        while left:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
