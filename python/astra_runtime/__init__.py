"""ASTRA's runtime: one Transformer over several devices that exchange vector-quantization codes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AstraError,
    CallEnded,
    ConnectFailed,
    DeadlineExceeded,
    HandshakeRefused,
    InputsDiffer,
    InvalidChoice,
    ModelChanged,
    NotFinite,
    PeerLost,
    PeersRefused,
    RequestMismatch,
    SessionRefused,
    WireError,
)
from .transport import connect, local_mesh
from .transport.credentials import KeysError

if TYPE_CHECKING:
    from .codes.codebook import Codebook
    from .engine import Engine
    from .plan import Plan
    from .sessions.session import Session

__version__ = "0.1.0"
__all__ = [
    "AstraError",
    "CallEnded",
    "Codebook",
    "ConnectFailed",
    "DeadlineExceeded",
    "Engine",
    "HandshakeRefused",
    "InputsDiffer",
    "InvalidChoice",
    "KeysError",
    "ModelChanged",
    "NotFinite",
    "PeerLost",
    "PeersRefused",
    "Plan",
    "RequestMismatch",
    "Session",
    "SessionRefused",
    "WireError",
    "connect",
    "local_mesh",
]


# What needs torch is imported when it is asked for; the transport and the command do without.
_LATE = {
    "Codebook": ".codes.codebook",
    "Engine": ".engine",
    "Plan": ".plan",
    "Session": ".sessions.session",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LATE[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
