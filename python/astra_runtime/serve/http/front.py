"""What every request passes: checks before it, an error in the reference's format, a log line."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..service import NotReady, QueueFull, RequestRefused, ServiceFailed, TimeIsUp
from .access import Hosts, Keys
from .errors import ApiError, failed, queue_full, unavailable
from .logs import Record
from .metrics import Metrics
from .options import HttpOptions

logger = logging.getLogger("astra_runtime.serve")
# Paths as they are counted; all others count as one.
PATHS = (
    "/", "/health", "/ready", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions",
    "/v1/embeddings", "/v1/images/classify", "/v1/astra/status",
)  # fmt: skip
UNLOGGED = ("/health", "/ready", "/metrics", "/v1/astra/status")
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Front:
    """ASGI middleware around the routes."""

    def __init__(self, app: ASGIApp, options: HttpOptions, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.keys, self.hosts = Keys(options.api_keys), Hosts(options.host, options.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(
            f"req-{secrets.token_hex(12)}",
            scope["method"],
            scope["path"][:200],
            client=scope["client"][0] if scope.get("client") else None,
        )
        scope.setdefault("state", {})["record"] = record

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                _add_headers(message, record)
            await send(message)

        try:
            await self._answer(scope, receive, send_marked, record)
        finally:
            self._count(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        try:
            self._check(scope)
            await self.app(scope, receive, send)
        except (asyncio.CancelledError, ClientDisconnect) as error:
            record.cancelled = True
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            answer = api_error(error)
            record.error = answer.summary()
            if record.status is None:
                await answer.response()(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self.hosts.check(headers.get("host"))
        path = scope["path"]
        guarded = path == "/metrics" or path == "/v1" or path.startswith("/v1/")
        if self.keys and guarded:
            self.keys.check(headers.get("authorization"))
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(
                    415,
                    f"Content-Type: expected application/json, got {kind[:80] or 'none'!r}",
                    code="unsupported_media_type",
                )

    def _count(self, record: Record) -> None:
        path = record.path if record.path in PATHS else "other"
        path = "/v1/models" if record.path.startswith("/v1/models/") else path
        if record.cancelled:
            self.metrics.cancelled.inc()
        if record.path not in UNLOGGED or record.error:
            record.end()
            self.metrics.seconds.labels(path).observe(record.seconds or 0.0)
        self.metrics.requests.labels(path, str(record.status)).inc()


def _add_headers(message: Message, record: Record) -> None:
    headers = MutableHeaders(raw=message.setdefault("headers", []))
    headers["X-Request-Id"] = record.request
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)


def api_error(error: Exception) -> ApiError:
    """What the client is told about an error of the service, or of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return queue_full(f"The service is overloaded: {error}", error.retry_after)
    if isinstance(error, NotReady):
        return unavailable(str(error))
    if isinstance(error, RequestRefused):
        return ApiError(400, error.message, param=error.param, code=error.code)
    if isinstance(error, TimeIsUp):
        return ApiError(504, str(error), kind="timeout_error", code="timeout")
    if isinstance(error, ServiceFailed):
        return failed(f"The request could not be finished: {error}", 503)
    logger.error("a request met an error of the server", exc_info=error)
    return failed("The server met an error; its log has more")


def record_of(scope: Mapping[str, Any] | MutableMapping[str, Any]) -> Record:
    """This request's line of the log, to be filled."""
    record: Record = scope["state"]["record"]
    return record
