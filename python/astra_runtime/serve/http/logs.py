"""One line of JSON a request, on stderr or wherever the host's logging leads."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from ..service import Done

logger = logging.getLogger("astra_runtime.serve")
MAX_NAMES = 256


@dataclass
class Record:
    """What is known of one request; the fields that are not None become its log line.

    Prompts and answers are not among them.
    """

    request: str
    method: str
    path: str
    client: str | None = None
    status: int | None = None
    cancelled: bool | None = None
    error: str | None = None
    stream: bool | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    coded_tokens: int | None = None
    completion_tokens: int | None = None
    rank: int | None = None
    degraded: bool | None = None
    seconds_queued: float | None = None
    seconds_to_first_token: float | None = None
    seconds: float | None = None
    begun: float = field(default_factory=time.monotonic, repr=False)

    def take(self, done: Done) -> None:
        """The figures of an answer; of several, tokens add up and the rest is the last one's."""
        self.finish_reason, self.rank = done.finish_reason, done.rank
        self.prompt_tokens, self.cached_tokens = done.prompt_tokens, done.cached_tokens
        self.coded_tokens = done.coded_tokens
        self.completion_tokens = (self.completion_tokens or 0) + done.completion_tokens
        self.degraded = bool(self.degraded) or done.degraded
        self.seconds_queued = round(done.seconds_queued, 4)

    def end(self) -> None:
        """Writes the line; 499 is the status of a client that left before there was one."""
        self.seconds = round(time.monotonic() - self.begun, 4)
        self.status = self.status or (499 if self.cancelled else 500)
        fields: dict[str, Any] = {
            name: value
            for name, value in vars(self).items()
            if value is not None and name != "begun"
        }
        broken = self.status >= 500 or (self.error is not None and self.status < 400)
        level = logging.WARNING if broken else logging.INFO
        logger.log(level, json.dumps({"time": round(time.time(), 3), **fields}))


class OnceEach:
    """Says of each unknown parameter once that it is ignored."""

    def __init__(self) -> None:
        self._names: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def say(self, path: str, names: list[str]) -> None:
        for name in names:
            key = (path, name[:64])
            with self._lock:
                if key in self._names or len(self._names) >= MAX_NAMES:
                    continue
                self._names.add(key)
            logger.info(json.dumps({"path": path, "ignored_parameter": key[1]}))
