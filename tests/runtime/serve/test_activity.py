"""What a status page says of the ranks' work."""

from __future__ import annotations

import pytest

from astra_runtime.serve.activity import WINDOW_SECONDS, Activity
from astra_runtime.transport.stats import Stats


def test_shares_and_rates_are_of_the_last_seconds() -> None:
    now = [100.0]
    activity = Activity(2, clock=lambda: now[0])
    assert activity.busy(1) is activity.tokens_per_s(1) is activity.bytes_per_s(1) is None

    def report(seconds: float, busy: float, tokens: int, sent: int, received: int) -> None:
        now[0] += seconds
        stats = Stats(bytes_sent_total=sent, bytes_received_total=received)
        activity.record(1, busy, tokens, stats)

    report(0.5, 0.25, 4, 1000, 100)
    assert (activity.busy(1), activity.tokens_per_s(1)) == (0.5, 8.0)
    report(0.5, 0.5, 4, 3000, 200)
    assert (activity.busy(1), activity.tokens_per_s(1)) == (0.75, 8.0)
    assert activity.bytes_per_s(1) == (4000.0, 200.0)
    for _ in range(8):
        report(1.0, 0.0, 0, 3000, 200)  # idle
    assert (activity.busy(1), activity.tokens_per_s(1)) == (0.0, 8.0)
    assert activity.bytes_per_s(1) == (0.0, 0.0)
    assert len(activity._ranks[1].reports) <= WINDOW_SECONDS + 1
    assert activity.busy(0) is None


def test_a_quick_sequence_of_reports_keeps_few_looks_at_the_link() -> None:
    now = [0.0]
    activity = Activity(1, clock=lambda: now[0])
    for _ in range(1000):
        now[0] += 0.01
        activity.record(0, 0.02, 1, Stats())
    assert activity.busy(0) == 1.0
    assert len(activity._ranks[0].link) < 40


def test_round_trips_are_smoothed() -> None:
    activity = Activity(2)
    assert activity.round_trip(1) is None
    activity.answered(1, 0.010)
    activity.answered(1, 0.020)
    assert activity.round_trip(1) == pytest.approx(0.013)
