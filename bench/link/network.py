"""The virtual link's network: when each message is whole at its receiver. No threads here.

Times are seconds of one virtual clock. A link that is busy until b and whose packets come at a₀ ≤
a₁ ≤ … and take s₀, s₁, … sends packet i off by

    dᵢ = max(aᵢ, dᵢ₋₁) + sᵢ = Sᵢ + max(b, max over j ≤ i of (aⱼ − Sⱼ₋₁)),    Sᵢ = s₀ + … + sᵢ,

one cumulative maximum. An uplink's packets come in the order of its rank's own clock, so they are
settled when they are sent. A downlink's come from many ranks, and one that was sent later in real
time may come earlier in virtual time: its queue is computed anew until virtual time has passed it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.link.model import Link

Floats = NDArray[np.float64]


def departures(arrivals: Floats, seconds: Floats, busy_until: float) -> Floats:
    """When each packet has crossed a link that serves them one after the other, in this order."""
    sums = np.cumsum(seconds)
    return sums + np.maximum(np.maximum.accumulate(arrivals - (sums - seconds)), busy_until)


@dataclass(eq=False)
class Message:
    """Something on its way. `done`: when its last packet has left the downlink, as far as known."""

    source: int
    size: int
    content: Any
    done: float = 0.0


@dataclass
class _Queue:
    """A downlink: packets that virtual time has not passed yet, in the order of their arrival."""

    busy_until: float = 0.0
    arrivals: Floats = field(default_factory=lambda: np.empty(0))
    seconds: Floats = field(default_factory=lambda: np.empty(0))
    sources: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    owners: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    messages: list[Message] = field(default_factory=list)
    fresh: list[tuple[Floats, Floats, Message]] = field(default_factory=list)

    def settle(self, now: float) -> None:
        """Finds when every message is done, given that nothing more arrives before `now`."""
        if not self.fresh:
            return
        arrivals, seconds = [self.arrivals], [self.seconds]
        sources, owners = [self.sources], [self.owners]
        for of_message, each, message in self.fresh:
            arrivals.append(of_message)
            seconds.append(each)
            sources.append(np.full(len(of_message), message.source, np.int64))
            owners.append(np.full(len(of_message), len(self.messages), np.int64))
            self.messages.append(message)
        self.fresh.clear()
        arrival, source = np.concatenate(arrivals), np.concatenate(sources)
        order = np.lexsort((source, arrival))  # stable: a sender's own packets keep their order
        arrival, source = arrival[order], source[order]
        each, owner = np.concatenate(seconds)[order], np.concatenate(owners)[order]
        departure = departures(arrival, each, self.busy_until)
        last = np.zeros(len(self.messages))
        last[owner] = departure  # times rise, and of several the last one stays
        for message, done in zip(self.messages, last.tolist(), strict=True):
            message.done = max(message.done, done)
        # what is gone by now stays as it is, whatever is sent from now on
        past = int(np.searchsorted(departure, now, side="right"))
        if past:
            self.busy_until = float(departure[past - 1])
        waiting, owner = np.unique(owner[past:], return_inverse=True)
        self.messages = [self.messages[i] for i in waiting.tolist()]
        self.owners = owner.reshape(-1).astype(np.int64)
        self.arrivals, self.seconds, self.sources = arrival[past:], each[past:], source[past:]


class Network:
    """Access links of `world_size` ranks at one switch.

    `send` is told in the order of each sender's own times. `arrival` may be asked once no rank can
    send before `now` any more.
    """

    def __init__(self, world_size: int, link: Link) -> None:
        self.link = link
        self.world_size = world_size
        self._uplinks = [0.0] * world_size  # busy until
        self._downlinks = [_Queue() for _ in range(world_size)]
        self._latest: dict[tuple[int, int], float] = {}  # arrival of a pair's last packet
        self._draws: dict[tuple[int, int], np.random.Generator] = {}
        self._inbox: dict[tuple[int, int], deque[Message]] = {}
        self._heard: dict[tuple[int, int], float] = {}  # when a pair's last message was whole
        self._packets: dict[int, Floats] = {}

    def send(self, source: int, target: int, size: int, content: Any, at: float) -> None:
        """A message of `size` bytes leaves its rank at time `at`."""
        seconds = self._packets.get(size)
        if seconds is None:
            seconds = self._packets.setdefault(size, self.link.packet_seconds(size))
        crossed = departures(np.full(len(seconds), at), seconds, self._uplinks[source])
        self._uplinks[source] = float(crossed[-1])
        arrivals = crossed - seconds + self.link.delay  # of the first bit: the switch cuts through
        if self.link.jitter_ms or self.link.loss:
            arrivals = self._disturbed(source, target, arrivals)
        message = Message(source, size, content)
        self._downlinks[target].fresh.append((arrivals, seconds, message))
        self._inbox.setdefault((target, source), deque()).append(message)

    def _disturbed(self, source: int, target: int, arrivals: Floats) -> Floats:
        """Jitter and loss, drawn by sender and receiver so that no other pair has a say in them."""
        pair, link = (source, target), self.link
        draws = self._draws.get(pair)
        if draws is None:
            draws = np.random.default_rng((link.seed, source, target))
            self._draws[pair] = draws
        late = draws.uniform(0.0, link.jitter_ms * 1e-3, len(arrivals))
        in_order = np.maximum.accumulate(arrivals + late)
        arrivals = np.maximum(in_order, self._latest.get(pair, 0.0))
        self._latest[pair] = float(arrivals[-1])
        if link.loss:
            losses = draws.geometric(1 - link.loss, len(arrivals)) - 1
            arrivals = arrivals + (2.0**losses - 1) * (link.rto_ms * 1e-3)
        return arrivals

    def first(self, target: int, source: int) -> Message | None:
        """The message that `target` takes next from `source`, if it has been sent."""
        inbox = self._inbox.get((target, source))
        return inbox[0] if inbox else None

    def arrival(self, target: int, source: int, now: float) -> float:
        """When the first message of `source` is whole at `target`."""
        self._downlinks[target].settle(now)
        return max(self._inbox[target, source][0].done, self._heard.get((target, source), 0.0))

    def take(self, target: int, source: int) -> Message:
        message = self._inbox[target, source].popleft()
        self._heard[target, source] = max(
            message.done, self._heard.get((target, source), 0.0)
        )  # TCP delivers in order
        return message

    def idle_until(self, rank: int) -> float:
        """When the uplink of `rank` has sent the last bit that it was given so far."""
        return self._uplinks[rank]

    def quiet(self, now: float) -> None:
        """Time starts again at 0 with idle links; what is on its way has arrived."""
        for queue in self._downlinks:
            queue.settle(now)
        self._uplinks = [0.0] * self.world_size
        self._downlinks = [_Queue() for _ in range(self.world_size)]
        self._latest.clear()
        self._heard.clear()
        for inbox in self._inbox.values():
            for message in inbox:
                message.done = 0.0
