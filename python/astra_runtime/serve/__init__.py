"""A service of one's own, and `astra serve`: requests in, tokens out, one mesh behind it.

    with Leader(engine, tokenizer) as leader:  # on rank 0; the other ranks call follow(engine)
        for event in leader.stream(GenerationRequest("1", ids)):
            print(event.text, end="")

`Encoding` does the same for embeddings and classes, `RunningService` for hosts with an event loop.
"""

from .encoding import Encoding
from .leader import Leader, Ticket
from .rank import follow
from .running import RunningService, Started
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
