"""What `astra plan` measures on connected devices: how quick they are, and their links.

Both are measured between rank 0 and each other rank in turn, with every rank in step.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..codes.codebook import Codebook
from ..control import Control
from ..errors import WireError
from ..transport import Link, Mesh
from ..transport.messages import receive_json, send_json
from .rates import Rates, measure_rates

TRIPS = 8  # round trips, of which the shortest counts
FIRST, MOST = 64 << 10, 16 << 20  # bytes of the first and the largest bulk frame
LONG = 0.2  # seconds that a bulk frame takes before its rate is believed
MAX_RATES = 1 << 16  # bytes of their JSON


@dataclass(frozen=True)
class Measurement:
    """What rank 0 has measured; lists have one entry a rank, rank 0's own link being None.

    Attributes:
        rtt_ms: round trip of the smallest frame between rank 0 and each rank.
        up_mbit, down_mbit: rates from rank 0 to each rank, and back.
        rates: by space, of every rank.
    """

    rtt_ms: list[float | None]
    up_mbit: list[float | None]
    down_mbit: list[float | None]
    rates: dict[str, list[Rates]]

    def link(self) -> Link:
        """The slowest of all: a block's exchange waits for it."""
        rates = [r for r in (*self.up_mbit, *self.down_mbit) if r is not None]
        trips = [t for t in self.rtt_ms if t is not None]
        return Link(min(rates, default=None), max(trips, default=0.0) / 2)


def probe(
    mesh: Mesh, timed: Mesh, model: nn.Module, books: dict[str, Codebook], tokens: int
) -> Measurement | None:
    """Collective; on rank 0 what was measured, on the others nothing.

    `timed` is the mesh whose links are measured, `books` what the exchange is measured with.
    """
    links: list[tuple[float | None, ...]] = [(None, None, None)]
    for peer in range(1, mesh.world_size):
        if mesh.rank == 0:
            links.append(_measure_link(timed, peer))
        elif mesh.rank == peer:
            _answer(timed)
        _in_step(mesh)
    own = {name: vars(measure_rates(model, book, tokens)) for name, book in books.items()}
    if mesh.rank:
        send_json(mesh, own, blocks=(Control.RATES_SIZE, Control.RATES), to=(0,))
        return None
    of_ranks = [own] + [_rates_of(mesh, peer) for peer in range(1, mesh.world_size)]
    trips, up, down = (list(column) for column in zip(*links, strict=True))
    rates = {name: [Rates(**rates_of[name]) for rates_of in of_ranks] for name in books}
    return Measurement(trips, up, down, rates)


def _rates_of(mesh: Mesh, peer: int) -> dict[str, Any]:
    blocks = (Control.RATES_SIZE, Control.RATES)
    return dict(receive_json(mesh, peer, blocks=blocks, limit=MAX_RATES, what="rates"))


def _measure_link(mesh: Mesh, peer: int) -> tuple[float, float, float]:
    """Round trip in ms, Mbit/s there, Mbit/s back; `_answer` is the other side."""
    trip = min(_trip(mesh, peer, 8, 8) for _ in range(TRIPS))
    rates = []
    for there in (True, False):
        size = FIRST
        while True:
            seconds = _trip(mesh, peer, *((size, 8) if there else (8, size))) - trip
            if seconds >= LONG or size >= MOST:
                break
            size *= 2
        # of payload and headers, which is what a link's rate is of
        rates.append(Link(1.0).seconds(size) / max(seconds, 1e-6))
    _ask(mesh, peer, 0, 0)
    return 1e3 * trip, rates[0], rates[1]


def _ask(mesh: Mesh, peer: int, there: int, back: int) -> None:
    mesh.send(struct.pack("<QQ", there, back), block=Control.PING, plan=0, to=(peer,))


def _trip(mesh: Mesh, peer: int, there: int, back: int) -> float:
    """Seconds from sending `there` bytes to having `back`, which the peer sends upon them."""
    _ask(mesh, peer, there, back)
    mesh.receive({peer: 8}, block=Control.PING, plan=0)  # it is ready
    data = bytes(there)
    start = time.perf_counter()
    mesh.send(data, block=Control.BULK, plan=0, to=(peer,))
    mesh.receive({peer: back}, block=Control.BULK, plan=0)
    return time.perf_counter() - start


def _answer(mesh: Mesh) -> None:
    """The other side of `_measure_link`."""
    while True:
        asked = mesh.receive({0: 16}, block=Control.PING, plan=0)[0]
        there, back = struct.unpack("<QQ", asked)
        if not there:
            return
        if max(there, back) > MOST:
            raise WireError("probe size", f"at most {MOST}", max(there, back), 0)
        data = bytes(back)
        mesh.send(bytes(8), block=Control.PING, plan=0, to=(0,))
        mesh.receive({0: there}, block=Control.BULK, plan=0)
        mesh.send(data, block=Control.BULK, plan=0, to=(0,))


def _in_step(mesh: Mesh) -> None:
    """Returns when every rank has come here."""
    others = [n for n in range(mesh.world_size) if n != mesh.rank]
    mesh.send(bytes(8), block=Control.RATES_SIZE, plan=1, to=others)
    mesh.receive(dict.fromkeys(others, 8), block=Control.RATES_SIZE, plan=1)
