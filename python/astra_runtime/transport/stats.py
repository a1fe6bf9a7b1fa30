"""What has crossed a rank's connections: bytes and messages."""

from __future__ import annotations

from dataclasses import dataclass, fields

from astra_runtime.control import is_control


@dataclass(slots=True)
class Stats:
    """Bytes and messages of one rank. `payload`: blocks; `control`: control messages;
    `total`: everything counted at the socket, headers and handshake included."""

    messages_sent: int = 0
    bytes_sent_payload: int = 0
    bytes_sent_control: int = 0
    bytes_sent_total: int = 0
    messages_received: int = 0
    bytes_received_payload: int = 0
    bytes_received_control: int = 0
    bytes_received_total: int = 0

    def count_sent(self, size: int, block: int) -> None:
        """A frame of `size` payload bytes."""
        self.messages_sent += 1
        if not is_control(block):
            self.bytes_sent_payload += size
        else:
            self.bytes_sent_control += size

    def count_received(self, size: int, block: int) -> None:
        self.messages_received += 1
        if not is_control(block):
            self.bytes_received_payload += size
        else:
            self.bytes_received_control += size

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))
