"""A slow access link to emulate: its rate, its delay, and how long a frame occupies it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from astra_runtime.wire import HEADER_SIZE

SEGMENT: Final = 1448  # payload bytes of a full TCP segment on Ethernet, timestamps on
SEGMENT_OVERHEAD: Final = 52  # IPv4 header 20, TCP header 20, timestamps option 12
TLS_RECORD_BYTES: Final = 16 << 10  # bytes of a frame in one record
TLS_RECORD_OVERHEAD: Final = 22  # a record's header 5, its type 1, its authentication 16


@dataclass(frozen=True)
class Link:
    """An access link: rate in Mbit/s (None: unlimited) and one-way delay in milliseconds."""

    mbit_per_s: float | None = None
    delay_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.mbit_per_s is not None and not self.mbit_per_s > 0:
            raise ValueError(f"mbit_per_s: expected a positive rate, got {self.mbit_per_s}")
        if not 0 <= self.delay_ms < math.inf:
            raise ValueError(f"delay_ms: expected 0 or more, and finite, got {self.delay_ms}")

    @property
    def is_free(self) -> bool:
        return self.mbit_per_s is None and self.delay_ms == 0

    def seconds(self, payload: int, *, encrypted: bool = False) -> float:
        """How long a frame of `payload` bytes occupies the link, all headers included."""
        if self.mbit_per_s is None:
            return 0.0
        frame = HEADER_SIZE + payload
        if encrypted:
            frame += TLS_RECORD_OVERHEAD * -(-frame // TLS_RECORD_BYTES)
        return (frame + SEGMENT_OVERHEAD * -(-frame // SEGMENT)) * 8e-6 / self.mbit_per_s
