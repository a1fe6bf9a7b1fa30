"""What a client is told when a request fails, in the format of OpenAI's reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

Headers = Mapping[str, str]
INVALID = "invalid_request_error"


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of the HTTP answer.
        message: a sentence for people.
        param: the parameter that is wrong, such as "messages[0].content".
        code: a word for programs, such as "model_not_found".
        kind: the reference's `type`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.kind, self.headers = code, kind, dict(headers or {})

    def content(self) -> dict[str, Any]:
        """The body of the answer, and of an event that ends a stream."""
        inner = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": inner}

    def summary(self) -> str:
        """For a log: what a client sent is quoted in messages, which are not repeated there."""
        if self.status >= 500:
            return self.message
        return " ".join(filter(None, (self.code or self.kind, self.param)))

    def response(self) -> JSONResponse:
        return JSONResponse(self.content(), self.status, headers=self.headers)


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400: a parameter that cannot be used."""
    return ApiError(400, message, param=param, code=code)


def expected(param: str, wanted: str, got: object) -> ApiError:
    """400 with the parameter's name, what it may be and what came."""
    return invalid(param, f"{param}: expected {wanted}, got {_short(repr(got))}")


def _short(text: str) -> str:
    """What clients sent may be megabytes."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def too_long(param: str, prompt: int, new: int, limit: int) -> ApiError:
    """400: the prompt with what is to follow does not fit into the model's context."""
    asked = f"{prompt} in the prompt" + (f", {new} to be generated" if new else "")
    return invalid(
        param,
        f"This model's maximum context length is {limit} tokens. However, you requested "
        f"{prompt + new} tokens ({asked}).",
        "context_length_exceeded",
    )


def no_model(name: str) -> ApiError:
    return ApiError(
        404, f"The model {_short(name)!r} does not exist", param="model", code="model_not_found"
    )


def no_path(method: str, path: str) -> ApiError:
    return ApiError(404, f"Invalid URL ({_short(method)} {_short(path)})")


def wrong_method(method: str, path: str, allowed: str) -> ApiError:
    message = f"Not allowed to {_short(method)} on {_short(path)}: expected {allowed}"
    return ApiError(405, message, headers={"Allow": allowed})


def unavailable(reason: str, retry_after: float = 1.0) -> ApiError:
    """503: the service cannot answer now, and why."""
    return ApiError(
        503,
        f"The service is not ready: {reason}",
        code="not_ready",
        kind="server_error",
        headers=_retry_after(retry_after),
    )


def queue_full(message: str, retry_after: float = 1.0) -> ApiError:
    """429: as many requests wait as may."""
    return ApiError(
        429,
        message,
        code="rate_limit_exceeded",
        kind="rate_limit_error",
        headers=_retry_after(retry_after),
    )


def failed(message: str, status: int = 500) -> ApiError:
    """500, or 503 where another try may help: what the client is not at fault for."""
    return ApiError(status, message, kind="server_error", code="service_failed")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
