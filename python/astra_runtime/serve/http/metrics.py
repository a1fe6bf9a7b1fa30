"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from ..service import Done, Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 30, 60, 120)
_EACH = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.35, 0.5, 1, 2, 5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """One server's counters; each app has a registry of its own."""

    def __init__(self, service: Service) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_StatusCollector(service))
        self.requests = Counter(
            "astra_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.cancelled = Counter(
            "astra_requests_cancelled", "Requests whose client left before the answer was whole.",
            registry=registry,
        )  # fmt: skip
        self.tokens = Counter(
            "astra_tokens", "Tokens: of prompts, of these known before, and generated.", ["kind"],
            registry=registry,
        )  # fmt: skip
        self.degraded = Counter(
            "astra_degraded_answers", "Answers that lack tokens of a device.", registry=registry
        )
        self.first = Histogram(
            "astra_time_to_first_token_seconds", "From a request's arrival to its first token.",
            buckets=_FIRST, registry=registry,
        )  # fmt: skip
        self.each = Histogram(
            "astra_time_per_token_seconds", "Between two tokens of an answer.",
            buckets=_EACH, registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "astra_request_seconds", "From a request's arrival to the end of its answer.", ["path"],
            buckets=_WHOLE, registry=registry,
        )  # fmt: skip
        for kind in ("prompt", "cached", "generated"):
            self.tokens.labels(kind)

    def count_prompt(self, done: Done) -> None:
        """The prompt of a request: once, however many answers it has."""
        self.tokens.labels("prompt").inc(done.prompt_tokens)
        self.tokens.labels("cached").inc(done.cached_tokens)

    def count_answer(self, done: Done) -> None:
        self.tokens.labels("generated").inc(done.completion_tokens)
        if done.degraded:
            self.degraded.inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _StatusCollector:
    """What the service knows itself, asked when Prometheus asks."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def describe(self) -> list[Metric]:
        """Nothing: to register it asks the service nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        status = self.service.status()
        gauges = {
            "ready": (status.ready, "Whether a request would be answered."),
            "requests_queued": (status.queued, "Requests that wait."),
            "requests_running": (status.running, "Requests that are worked on."),
            "queue_limit": (status.max_queue, "How many requests may wait."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"astra_{name}", text, value=float(value))
        yield _labelled(GaugeMetricFamily, "peers", "Devices by state.", "state", _states(status))
        wire = {"sent": 0, "received": 0}
        for peer in status.peers:
            # rank 0's own figures are those of all its links
            if peer.rank == 0:
                wire = {"sent": peer.bytes_sent, "received": peer.bytes_received}
        yield _labelled(
            CounterMetricFamily, "wire_bytes", "Bytes between rank 0 and the others.",
            "direction", wire,
        )  # fmt: skip
        yield from _by_rank(status.peers)
        for name, value in (("peers_lost", status.lost), ("peers_rejoined", status.rejoined)):
            text = "How often " + (
                "a device was lost." if name == "peers_lost" else "all were back."
            )
            yield CounterMetricFamily(f"astra_{name}", text, value=value)


def _by_rank(peers: Any) -> Iterator[Metric]:
    """What is known of each device: a sample a rank, none where it is not known."""
    known = {
        "peer_busy_ratio": ("The share of the last seconds for which a device computed.", "busy"),
        "peer_decode_tokens_per_second": (
            "Tokens a second of a device's answers, when it last decoded.", "decode_tokens_per_s",
        ),
        "peer_prefill_tokens_per_second": (
            "Tokens a second of a prompt that one device reads.", "prefill_tokens_per_s",
        ),
    }  # fmt: skip
    for name, (text, attribute) in known.items():
        values = {str(peer.rank): getattr(peer, attribute) for peer in peers}
        values = {rank: value for rank, value in values.items() if value is not None}
        yield _labelled(GaugeMetricFamily, name, text, "rank", values)
    trips = {str(peer.rank): peer.rtt_ms / 1e3 for peer in peers if peer.rtt_ms is not None}
    text = "Between a question of rank 0's and the answer, without work."
    yield _labelled(GaugeMetricFamily, "peer_round_trip_seconds", text, "rank", trips)
    for direction in ("sent", "received"):
        text = f"Bytes that rank 0 has {direction}, by the other device."
        crossed = {
            str(peer.rank): getattr(peer, f"bytes_{direction}") for peer in peers if peer.rank
        }
        yield _labelled(CounterMetricFamily, f"peer_{direction}_bytes", text, "rank", crossed)


def _states(status: Any) -> dict[str, int]:
    states = {"here": 0, "loading": 0, "away": 0}
    for peer in status.peers:
        states[peer.state] = states.get(peer.state, 0) + 1
    return states


def _labelled(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    label: str,
    values: Mapping[str, float],
) -> Metric:
    family = kind(f"astra_{name}", text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
