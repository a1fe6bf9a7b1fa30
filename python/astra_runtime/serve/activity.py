"""What each rank did in the last seconds, by its reports to the leader: how busy, how quick."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..transport.stats import Stats

WINDOW_SECONDS = 5.0
LEAST_SECONDS = 0.2  # between two looks at a link's bytes


@dataclass(frozen=True)
class _Report:
    """One report: when it came, seconds since the one before, seconds computed, tokens drawn."""

    at: float
    seconds: float
    busy: float
    tokens: int


@dataclass
class _Rank:
    last: float  # when its last report came
    reports: deque[_Report] = field(default_factory=deque)
    link: deque[tuple[float, int, int]] = field(default_factory=deque)  # when, sent, received
    tokens_per_s: float | None = None
    round_trip: float | None = None


class Activity:
    """Of one mesh, from its beginning on.

    Args:
        ranks: how many there are.
        clock: gives seconds.

    Example:
        >>> activity = Activity(2)
        >>> activity.busy(1) is None
        True
    """

    def __init__(self, ranks: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        now = clock()
        self._ranks = [_Rank(now) for _ in range(ranks)]

    def record(self, rank: int, busy: float, tokens: int, stats: Stats) -> None:
        """A report of a rank: seconds for which it computed since the last one, tokens that it
        drew, and what has crossed its link so far."""
        now, one = self._clock(), self._ranks[rank]
        one.reports.append(_Report(now, now - one.last, busy, tokens))
        one.last = now
        if not one.link or now - one.link[-1][0] >= LEAST_SECONDS:
            one.link.append((now, stats.bytes_sent_total, stats.bytes_received_total))
        while one.reports[0].at < now - WINDOW_SECONDS:
            one.reports.popleft()
        while len(one.link) > 2 and one.link[1][0] < now - WINDOW_SECONDS:
            one.link.popleft()
        decoding = [report for report in one.reports if report.tokens]
        seconds = sum(report.seconds for report in decoding)
        if seconds > 0:
            one.tokens_per_s = sum(report.tokens for report in decoding) / seconds

    def answered(self, rank: int, seconds: float) -> None:
        """A rank that had nothing to do has answered after so long."""
        one = self._ranks[rank]
        before = seconds if one.round_trip is None else one.round_trip
        one.round_trip = before + 0.3 * (seconds - before)

    def busy(self, rank: int) -> float | None:
        """The share of the last seconds for which a rank computed, 0 to 1; None: not known yet."""
        reports = self._ranks[rank].reports
        seconds = sum(report.seconds for report in reports)
        return min(1.0, sum(report.busy for report in reports) / seconds) if seconds > 0 else None

    def tokens_per_s(self, rank: int) -> float | None:
        """Tokens a second that a rank drew when it last decoded, of all its answers together."""
        return self._ranks[rank].tokens_per_s

    def bytes_per_s(self, rank: int) -> tuple[float, float] | None:
        """Sent to a rank and received of it in the last seconds, by rank 0; of rank 0 itself: over
        all links. None: not known yet."""
        link = self._ranks[rank].link
        if len(link) < 2:
            return None
        (start, sent, received), (stop, sent_now, received_now) = link[0], link[-1]
        seconds = stop - start
        return (sent_now - sent) / seconds, (received_now - received) / seconds

    def round_trip(self, rank: int) -> float | None:
        """Seconds between a question to a rank without work and its answer."""
        return self._ranks[rank].round_trip
