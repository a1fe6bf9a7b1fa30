"""The listening side: uvicorn, with a bound on every wait for a client."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from .access import check_exposure
from .errors import ApiError
from .listening import BACKLOG, open_listeners, tls_context, url_of
from .server_state import ServerState

HEADERS_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 30
MAX_HEADERS = 64 << 10
# After the answers were told to end: until their connections are closed.
END_S = 2


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, which by itself waits for ever for headers and for a client that does
    not read."""

    headers_timeout, write_timeout = HEADERS_TIMEOUT_S, WRITE_TIMEOUT_S
    max_connections = 512
    _headers_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            answer = ApiError(503, "Too many connections", kind="server_error", code="overloaded")
            self._refuse(answer)
            return
        self._await_headers()

    def _await_headers(self) -> None:
        if self._headers_timer is None:
            self._headers_timer = self.loop.call_later(self.headers_timeout, self.transport.abort)

    def _cancel(self, *names: str) -> None:
        for name in names:
            timer = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)

    def data_received(self, data: bytes) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle:
            self._await_headers()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._cancel("_headers_timer")

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel("_headers_timer", "_write_timer")
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("_write_timer")

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered in the reference's format, too."""
        self._refuse(ApiError(400, msg))

    def _refuse(self, answer: ApiError) -> None:
        body = json.dumps(answer.content()).encode()
        reason = "Bad Request" if answer.status == 400 else "Service Unavailable"
        head = (
            f"HTTP/1.1 {answer.status} {reason}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._cancel("_headers_timer")
        self.transport.write(head.encode() + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """Ends in order: no new requests, then time for those that run, then an error for the rest."""

    def __init__(self, config: uvicorn.Config, state: ServerState, drain_s: float) -> None:
        super().__init__(config)
        self.state, self.drain_s = state, drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets answers end, the second ends them."""
        if self.should_exit:
            self.state.ending.end_all()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.state.ending.draining = True
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.drain_s, self.state.ending.end_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def run_server(
    app: Starlette,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    certfile: str | None = None,
    keyfile: str | None = None,
    drain_s: float = 10.0,
    max_connections: int = 512,
    headers_timeout_s: float = HEADERS_TIMEOUT_S,
    write_timeout_s: float = WRITE_TIMEOUT_S,
    listeners: Sequence[socket.socket] = (),
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serves the app of `make_app` until SIGINT, SIGTERM or `app.state.stop()`.

    Args:
        app: of `make_app`.
        host, port: the address to listen at; port 0: any free one.
        certfile, keyfile: PEM files, for HTTPS; the key may be in the certificate's file.
        drain_s: how long running answers may go on at the end.
        max_connections: further ones get 503 at once.
        headers_timeout_s: how long a client may take to send a request's headers.
        write_timeout_s: how long a client may read nothing of what waits for it.
        listeners: those of `open_listeners` for this address, opened before; closed at the end.
        on_listening: called with the URL, once the server listens.

    Raises:
        AstraError: the address is in use, other machines reach it and the app has no key, or the
            certificate cannot be read or is not valid now.
    """
    state: ServerState = app.state.server
    check_exposure(host, state.options.api_keys, state.options.insecure)
    protocol = _bounded(headers_timeout_s, write_timeout_s, max_connections)
    context = tls_context(certfile, keyfile)
    listeners = listeners or open_listeners(host, port)
    server = _Server(_config(app, protocol, context, drain_s), state, drain_s)

    def stop() -> None:
        server.should_exit = True

    app.state.stop = stop
    if on_listening is not None:
        on_listening(url_of(listeners[0], host, tls=context is not None))
    try:
        server.run(sockets=list(listeners))
    finally:
        for listener in listeners:
            listener.close()


def _bounded(
    headers_timeout_s: float, write_timeout_s: float, max_connections: int
) -> type[Protocol]:
    bounds = {
        "headers_timeout": headers_timeout_s,
        "write_timeout": write_timeout_s,
        "max_connections": max_connections,
    }
    return type("BoundProtocol", (Protocol,), bounds)


def _config(
    app: Starlette, protocol: type[Protocol], context: ssl.SSLContext | None, drain_s: float
) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_TIMEOUT_S,
        timeout_graceful_shutdown=round(drain_s) + END_S,
        h11_max_incomplete_event_size=MAX_HEADERS,
    )
    config.load()
    config.ssl = context
    return config
