"""What the console asks for once a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..service import Span
from .server_state import ServerState

MAX_SPANS = 4000


def status_report(state: ServerState, known: str | None = None) -> dict[str, Any]:
    """The service's `Status` as JSON, beside the model and what it does.

    Args:
        known: the `timeline_key` of a report before; its timeline is left out where it is the same.
    """
    service = state.service
    status, reason = service.status(), state.not_ready()
    spans = status.timeline
    key = f"{len(spans)}-{spans[-1].stop:.6f}" if spans else ""
    timeline = None if key == known else [_span(span) for span in _longest(spans)]
    return {
        "model": service.model_id,
        "kind": service.kind,
        "context_length": service.context_length,
        "max_new_tokens": state.options.max_new_tokens,
        **dataclasses.asdict(dataclasses.replace(status, timeline=())),
        "ready": not reason,
        "reason": reason,
        "timeline": timeline,
        "timeline_key": key,
    }


def _longest(spans: Sequence[Span]) -> Sequence[Span]:
    """At most so many that a page draws them quickly: the short ones would be invisible."""
    if len(spans) <= MAX_SPANS:
        return spans
    return sorted(spans, key=lambda span: span.start - span.stop)[:MAX_SPANS]


def _span(span: Span) -> dict[str, Any]:
    times = {"start": round(span.start, 6), "stop": round(span.stop, 6)}
    return {"rank": span.rank, "name": span.name, **times}
