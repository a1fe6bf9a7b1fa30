"""What a link costs: the one description that the virtual link and the user-space switch share.

Every rank has one full-duplex access link to a switch, all of the same rate. A message to N−1 peers
crosses its sender's uplink N−1 times, one after the other; at the switch its packets queue, first
in first out, for the receiver's downlink. The switch cuts through: a packet leaves on the downlink
while it comes in on the uplink. So a message that finds both links idle takes its bits over the
rate once, plus the one-way delay; a switch that stored each packet first would add one packet's
time a message.

Nothing is saved up while a link idles: there is no burst, and messages below a packet are exact.

Queues are unlimited, as is TCP's window: what is sent is on the link as soon as the link is free.
Pure acknowledgements are not counted (they share the reverse direction, 3 % of a bulk transfer's
bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

MTU: Final = 1500  # bytes of an IP packet
IP_TCP: Final = 52  # IPv4 header 20, TCP header 20, timestamps option 12
SEGMENT: Final = MTU - IP_TCP
ETHERNET: Final = 18  # header 14, checksum 4; 38 with preamble and the gap between two frames
TLS_RECORD: Final = 22  # header 5, content type 1, tag 16
TLS_MOST: Final = 16384  # bytes of a record


@dataclass(frozen=True)
class Link:
    """An access link and the way to the switch and on.

    Attributes:
        mbit_per_s: rate of each direction, 10⁶ bits a second.
        rtt_ms: round trip of an empty network; one way takes half of it.
        jitter_ms: every packet is late by a uniform draw from 0 to this. Packets of one sender to
            one receiver do not overtake each other.
        loss: probability that a packet is lost on its way to the downlink. In the virtual link it
            then arrives `rto_ms` later, twice that after a second loss and so on; what the same
            sender sent the same receiver afterwards waits for it, as TCP delivers in order. Its
            repetition takes room on the downlink but not, a second time, on the uplink. The
            switch drops the packet and leaves the rest to the kernel's TCP.
        rto_ms: the least retransmission time of Linux.
        ethernet: bytes of framing around an IP packet.
        tls: messages are TLS 1.3 records (22 bytes for each 16 KiB begun). Virtual link only: on
            real sockets whoever encrypts sends these bytes itself.
        seed: of jitter and loss.
    """

    mbit_per_s: float
    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    rto_ms: float = 200.0
    ethernet: int = ETHERNET
    tls: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.mbit_per_s < float("inf"):
            raise ValueError(f"mbit_per_s: expected a positive rate, got {self.mbit_per_s}")
        for name in ("rtt_ms", "jitter_ms", "rto_ms", "ethernet"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss: expected a probability below 1, got {self.loss}")

    @property
    def delay(self) -> float:
        """Seconds that one way takes, jitter aside."""
        return self.rtt_ms * 5e-4

    def on_wire(self, size: int) -> NDArray[np.float64]:
        """Bytes of each packet of a message: `size` bytes handed to a socket in one call."""
        if self.tls:
            size += TLS_RECORD * max(1, -(-size // TLS_MOST))
        full, rest = divmod(size, SEGMENT)
        packets = np.full(full + (rest > 0 or full == 0), MTU + self.ethernet, np.float64)
        if rest or not full:
            packets[-1] = rest + IP_TCP + self.ethernet
        return packets

    def packet_seconds(self, size: int) -> NDArray[np.float64]:
        """How long each packet of a message of `size` bytes occupies a link."""
        return self.on_wire(size) * (8e-6 / self.mbit_per_s)

    def seconds(self, size: int) -> float:
        """How long a message of `size` bytes occupies a link, all headers included."""
        return float(self.packet_seconds(size).sum())
