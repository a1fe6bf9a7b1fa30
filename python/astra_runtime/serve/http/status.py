"""What the console asks for once a second."""

from __future__ import annotations

import dataclasses
from typing import Any

from .server_state import ServerState


def status_report(state: ServerState) -> dict[str, Any]:
    """The service's `Status` as JSON, beside the model and what it does."""
    service = state.service
    status, reason = service.status(), state.not_ready()
    return {
        "model": service.model_id,
        "kind": service.kind,
        "context_length": service.context_length,
        **dataclasses.asdict(status),
        "ready": not reason,
        "reason": reason,
    }
