"""What the console asks for once a second."""

from __future__ import annotations

import dataclasses
from typing import Any

from .server_state import ServerState


def status_report(state: ServerState) -> dict[str, Any]:
    """The service's `Status` as JSON, beside the model and what it does."""
    service = state.service
    status = service.status()
    reason = "it is being shut down" if state.ending.draining else status.reason
    return {
        "model": service.model_id,
        "kind": service.kind,
        "context_length": service.context_length,
        **dataclasses.asdict(status),
        "ready": status.ready and not state.ending.draining,
        "reason": reason,
    }
