"""What the endpoints of one app share."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from starlette.requests import Request

from ...errors import AstraError
from ..service import Event, GenerationRequest, Service, Span, TimeIsUp
from .connection import SHUTTING_DOWN, Ending, read_body
from .errors import ApiError, no_model, unavailable
from .logs import OnceEach
from .metrics import Metrics
from .options import HttpOptions
from .schemas import Endpoint, parse_body

T = TypeVar("T")
logger = logging.getLogger("astra_runtime.serve")
PATHS = {
    "decoder": "/v1/chat/completions or /v1/completions",
    "encoder": "/v1/embeddings",
    "vision": "/v1/images/classify",
}


class ServerState:
    """The service, the options, and what is counted.

    Attributes:
        created: when the app was made, in seconds since 1970.
        ending: set when running answers have to end.
    """

    def __init__(self, service: Service, options: HttpOptions) -> None:
        if options.trace_folder is not None:
            make_folder(options.trace_folder)
        self.service, self.options = service, options
        self.metrics, self.ending = Metrics(service), Ending()
        self.created = int(time.time())
        self._unknown = OnceEach()
        # a tokenizer is not safe to be used by several threads at once
        self._thread = ThreadPoolExecutor(1, "astra-tokenize")

    @classmethod
    def of(cls, request: Request) -> ServerState:
        return cast(ServerState, request.app.state.server)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def read(self, request: Request, endpoint: Endpoint, kind: str) -> dict[str, Any]:
        """The checked values of a request's body, for a model of `kind`."""
        options = self.options
        body = parse_body(await read_body(request, options.max_body, options.body_timeout_s))
        values, unknown = endpoint.read(body)
        self._unknown.say(request.url.path, unknown)
        if values["model"] != self.service.model_id:
            raise no_model(values["model"])
        if self.service.kind != kind:
            raise ApiError(
                400,
                f"The model {self.service.model_id!r} does not answer at {request.url.path}: "
                f"ask {PATHS[self.service.kind]}",
                param="model",
                code="unsupported_endpoint",
            )
        return values

    def not_ready(self) -> str:
        """Why no answer can be given now, or ""."""
        if self.ending.draining:
            return SHUTTING_DOWN
        status = self.service.status()
        return "" if status.ready else status.reason or "unknown"

    def check_ready(self) -> None:
        """503 with the reason while no answer can be given."""
        reason = self.not_ready()
        if reason:
            raise unavailable(reason)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """A text of megabytes takes a tokenizer a second, in which streams go on."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, function, *arguments)

    async def in_time(self, work: Awaitable[T]) -> T:
        """What `work` returns, if it does within the time that an answer may take."""
        seconds = self.options.request_timeout_s
        if seconds is None:
            return await work
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            raise TimeIsUp(f"not finished within {seconds:g} s") from None

    async def generate(self, asked: GenerationRequest) -> AsyncGenerator[Event]:
        """The service's events; to close this closes, and so cancels, the service's iterator."""
        events: AsyncIterator[Event] = self.service.generate(asked)
        try:
            async for event in events:
                yield event
        finally:
            close = getattr(events, "aclose", None)
            if close is not None:
                await close()

    async def write_trace(self, name: str, spans: Sequence[Span]) -> None:
        """Writes the timeline of a request, if the options say where to."""
        if self.options.trace_folder is None:
            return
        path = self.options.trace_folder / f"{name}.json"
        try:
            await asyncio.to_thread(_write_spans, path, name, spans)
        except OSError as error:
            # a full disk takes nobody's answer away
            logger.error("a timeline could not be written: %s", error)


def make_folder(folder: Path) -> None:
    """Makes sure that it takes files: before hours of requests, and not after the first."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise AstraError(
            f"--trace: cannot make the folder {folder}, or files in it: {error.strerror}"
        ) from error


def _write_spans(path: Path, name: str, spans: Sequence[Span]) -> None:
    from ...trace import write_timeline

    ranks: dict[int, list[tuple[str, int, int, int]]] = {}
    for span in spans:
        nanoseconds = round(span.start * 1e9), round(span.stop * 1e9)
        ranks.setdefault(span.rank, []).append((span.name, -1, *nanoseconds))
    write_timeline(path, ranks, request=name)
