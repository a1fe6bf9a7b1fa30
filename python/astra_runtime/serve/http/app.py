"""The ASGI application: an OpenAI-compatible server in front of a `Service`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..service import Service
from .console import console_routes
from .errors import ApiError, no_model, no_path, wrong_method
from .front import Front
from .generation import chat, completions
from .metrics import CONTENT_TYPE
from .options import HttpOptions
from .server_state import ServerState
from .status import status_report
from .vectors import classify, embeddings


def make_app(service: Service, options: HttpOptions | None = None) -> Starlette:
    """An ASGI application for `run_server`, or any other ASGI server.

    Args:
        service: asked for everything; it may still be loading.
        options: keys, names and limits.

    Returns:
        The application; `app.state.server` is its `ServerState`.
    """
    state = ServerState(service, options or HttpOptions())
    middleware = [Middleware(Front, options=state.options, metrics=state.metrics)]
    if state.options.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=state.options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=routes(),
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.server = state
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    app.state.server.close()


def routes() -> list[Route]:
    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/images/classify", classify, methods=["POST"]),
        Route("/v1/astra/status", status),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        *console_routes(),
    ]


async def models(request: Request) -> JSONResponse:
    state = ServerState.of(request)
    return JSONResponse({"object": "list", "data": [_model(state)]})


async def model(request: Request) -> JSONResponse:
    state, name = ServerState.of(request), request.path_params["name"]
    if name != state.service.model_id:
        raise no_model(name)
    return JSONResponse(_model(state))


def _model(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.service.model_id,
        "object": "model",
        "created": state.created,
        "owned_by": "astra",
        "kind": state.service.kind,
        "context_length": state.service.context_length,
    }


async def health(_: Request) -> JSONResponse:
    """200 while the process serves, whatever the mesh does."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> JSONResponse:
    """200 only while a question would be answered; else 503 and the reason."""
    reason = ServerState.of(request).not_ready()
    if reason:
        return JSONResponse({"ready": False, "reason": reason}, 503, headers={"Retry-After": "1"})
    return JSONResponse({"ready": True})


async def status(request: Request) -> JSONResponse:
    """What the console shows: devices, the queue, the last request's timeline."""
    known = request.query_params.get("timeline")
    return JSONResponse(status_report(ServerState.of(request), known))


async def metrics(request: Request) -> Response:
    text = ServerState.of(request).metrics.text()
    return Response(text, headers={"Content-Type": CONTENT_TYPE})


async def _http_error(request: Request, error: Exception) -> Response:
    """The framework's own 404 and 405, in the reference's format."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        answer = wrong_method(method, path, allowed)
    elif error.status_code == 404:
        answer = no_path(method, path)
    else:
        answer = ApiError(error.status_code, str(error.detail))
    return answer.response()
