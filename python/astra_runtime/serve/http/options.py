"""The settings of the HTTP server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .access import check_exposure, check_names


@dataclass(frozen=True)
class HttpOptions:
    """What clients may do, and how much of it.

    Attributes:
        host: what the server listens at, one of the names by which it may be called.
        api_keys: a request to /v1 or /metrics brings one of these; none: nobody needs any, which is
            refused off loopback but with `insecure`.
        allowed_hosts: further names in Host headers, such as a reverse proxy's.
        cors_origins: pages of other origins that may ask, such as "https://example.org"; "*": all.
        max_body: bytes of a request's body.
        max_new_tokens: the most that a request may ask for; None: what the context has room for.
        max_choices: the largest `n`, and prompts of one request times `n`.
        body_timeout_s: how long a client may take to send its body.
        request_timeout_s: how long an answer may take; None: as long as it does.
        heartbeat_s: how often a stream that waits says so, in a comment.
        trace_folder: where each request's timeline is written, for ui.perfetto.dev; None: nowhere.
        degrade: answer without a device that is late, where the service may, and say so.

    Raises:
        AstraError: others could reach it without a key.
        ValueError: a limit that leaves nothing; names and origins that no request can have.
    """

    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = ()
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body: int = 4 << 20
    max_new_tokens: int | None = None
    max_choices: int = 16
    body_timeout_s: float = 30.0
    request_timeout_s: float | None = None
    heartbeat_s: float = 10.0
    trace_folder: Path | None = None
    degrade: bool = False

    def __post_init__(self) -> None:
        check_exposure(self.host, self.api_keys, self.insecure)
        check_names(self.allowed_hosts, self.cors_origins)
        for name in ("max_body", "max_new_tokens", "max_choices", "body_timeout_s", "heartbeat_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        if self.request_timeout_s is not None and not self.request_timeout_s > 0:
            raise ValueError(
                f"request_timeout_s: expected more than 0, got {self.request_timeout_s}"
            )
