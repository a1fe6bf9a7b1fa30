"""A forked process that wants to join, and may be somebody who must not."""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import torch

import astra_runtime.transport as transport
from astra_runtime import AstraError, Codebook, Engine, HandshakeRefused, connect

from .forks import Told
from .rank import subject


class _Log(logging.Handler):
    """What a rank writes to its log of the callers that it refused."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def join(
    told: Told,
    number: int,
    peers: list[str],
    *,
    keys: str | None = None,
    after: float = 0.0,
    wait: float = 10.0,
    version: int | None = None,
    other: str | None = None,
) -> None:
    """Joins as rank `number` and makes an engine.

    Args:
        after: seconds to let others go first. wait: seconds that it waits for the others.
        version: a protocol version to claim.
        other: what is not as usual, "model", "codebook" (the same as "dense")
            or "plan".

    Told: `error`, its type; `refused`, whether it is a HandshakeRefused; `words`, of the error and
    of the log; `ms` until then.
    """
    model, book, _ = subject()
    log = _Log()
    logging.getLogger("astra_runtime.transport").addHandler(log)
    if version is not None:
        transport.Hello = functools.partial(transport.Hello, version=version)  # type: ignore
    time.sleep(after)
    start = time.monotonic()
    try:
        with connect(number, len(peers), peers, keys=keys, connect_timeout=wait) as mesh:
            Engine(*_subject_of(other, model, book), mesh, **_plan_of(other, len(peers)))
            told(joined=True)
    except AstraError as error:
        words = "\n".join([str(error), *log.lines])
        refused = isinstance(error, HandshakeRefused)
        told(error=type(error).__name__, refused=refused, words=words)
        told(ms=1e3 * (time.monotonic() - start))


def _subject_of(other: str | None, model: Any, book: Codebook) -> tuple[Any, Codebook]:
    if other == "model":
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1
    dense = other in (
        "model",
        "codebook",
        "dense",
    )  # a fitted one refuses another model
    return model, Codebook.none() if dense else book


def _plan_of(other: str | None, world_size: int) -> dict[str, Any]:
    return {"weights": [1.0 + rank for rank in range(world_size)]} if other == "plan" else {}
