"""ASTRA's runtime: one Transformer over several devices that exchange vector-quantization codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    AstraError,
    ConnectFailed,
    DeadlineExceeded,
    HandshakeRefused,
    PeerLost,
    WireError,
)
from .plan import Plan
from .transport import connect, local_mesh

if TYPE_CHECKING:
    from .codes.codebook import Codebook
    from .engine import Engine

__version__ = "0.1.0"
__all__ = [
    "AstraError",
    "Codebook",
    "ConnectFailed",
    "DeadlineExceeded",
    "Engine",
    "HandshakeRefused",
    "PeerLost",
    "Plan",
    "WireError",
    "connect",
    "local_mesh",
]


def __getattr__(name: str) -> Any:
    """Engine and Codebook need torch; the transport alone does not."""
    if name == "Engine":
        from .engine import Engine

        return Engine
    if name == "Codebook":
        from .codes.codebook import Codebook

        return Codebook
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
