"""A service of one's own, and `astra serve`: requests in, tokens out, one mesh behind it.

    with Leader(engine, tokenizer) as leader:  # on rank 0; the other ranks call follow(engine)
        for event in leader.stream(GenerationRequest("1", ids)):
            print(event.text, end="")

`Encoding` does the same for embeddings and classes, `RunningService` for hosts with an event loop.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .service import (
    Done,
    Embedding,
    Event,
    GenerationRequest,
    Label,
    NotReady,
    QueueFull,
    RequestRefused,
    Sampling,
    Service,
    ServiceFailed,
    Status,
    TimeIsUp,
    Token,
)

if TYPE_CHECKING:
    from .encoding import Encoding
    from .leader import Leader, Ticket
    from .rank import follow
    from .running import RunningService, Started

__all__ = [
    "Done",
    "Embedding",
    "Encoding",
    "Event",
    "GenerationRequest",
    "Label",
    "Leader",
    "NotReady",
    "QueueFull",
    "RequestRefused",
    "RunningService",
    "Sampling",
    "Service",
    "ServiceFailed",
    "Started",
    "Status",
    "Ticket",
    "TimeIsUp",
    "Token",
    "follow",
]

# What needs torch is imported when it is asked for: a server listens before it has loaded that.
_LATE = {
    "Encoding": ".encoding",
    "Leader": ".leader",
    "RunningService": ".running",
    "Started": ".running",
    "Ticket": ".leader",
    "follow": ".rank",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name], __name__), name)
