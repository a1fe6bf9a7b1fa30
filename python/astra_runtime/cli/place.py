"""This process among the ranks of a run: alone, a leader of workers, or one of torchrun's."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..console import say, working
from ..errors import AstraError
from .options import check_own_keys, connect_options, led_peers, sharing
from .waiting import Waiting


@dataclass(frozen=True)
class Place:
    """This process among the ranks, and who started the others.

    Attributes:
        peers: "host:port" of every rank, where the others are `astra worker`s of other devices.
        torchrun: it started all ranks alike. Where it did not and there are no `peers`, this
            process starts the others itself.
    """

    rank: int
    world_size: int
    peers: list[str] | None = None
    torchrun: bool = False

    @property
    def local(self) -> bool:
        return self.peers is None and not self.torchrun

    @property
    def on_this_machine(self) -> int:
        """How many ranks share this machine's cores."""
        if self.torchrun:
            return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        return self.world_size if self.peers is None else sharing(self.peers, self.rank)


def place_of(options: argparse.Namespace) -> Place:
    """Where the options and torchrun's variables place this process; refuses contradictions."""
    from ..transport.addresses import require_loopback
    from ..transport.rendezvous import from_environment, own_host

    peers = led_peers(options)
    if peers is not None:
        place = Place(0, len(peers), peers)
    elif (started := from_environment()) is None:
        place = Place(0, options.world_size or 1)
    elif options.world_size is not None:
        raise AstraError("--world-size: torchrun has said how many ranks there are; leave it out")
    elif options.trace:
        raise AstraError("--trace: not under torchrun, where no rank leads the others")
    else:
        place = Place(*started, torchrun=True)
    if options.backend != "tcp" and options.transport != "tcp":
        raise AstraError(f"--backend {options.backend}: expected without --transport datagram")
    if options.backend != "tcp" and not place.torchrun:
        raise AstraError(f"--backend {options.backend}: expected under torchrun only")
    if options.backend != "tcp" and options.on_missing == "degrade":
        raise AstraError(f"--backend {options.backend}: expected without --on-missing degrade")
    if place.peers is None:
        asked = connect_options(
            options, place.rank, place.world_size, None, backend=_backend(options)
        )
        if options.backend != "tcp":
            asked.require_loopback_in_plaintext()
        elif place.torchrun and place.world_size > 1 and asked.find_keys() is None:
            require_loopback([asked.host or own_host()])
        check_local_keys(options, place)
    return place


def _backend(options: argparse.Namespace) -> str:
    return options.backend if options.transport == "tcp" else options.transport


def check_local_keys(options: argparse.Namespace, place: Place) -> None:
    """Refuses keys that this machine's ranks could not use, before a model is loaded."""
    ranks = [place.rank] if place.torchrun else range(place.world_size)
    if options.backend == "tcp" and (options.keys or place.torchrun) and place.world_size > 1:
        check_own_keys(options, ranks, place.world_size)


@contextlib.contextmanager
def connected(
    options: argparse.Namespace, place: Place, model: Any, codebook: Any, settings: dict[str, Any]
) -> Iterator[Any]:
    """This rank's `Ranks` in a mesh that others started too.

    Under torchrun every rank was started alike and knows the job; else rank 0 sends it.
    """
    from ..deploy.jobs import Ranks

    with _open_mesh(options, place) as mesh:
        ranks = Ranks(model, codebook, mesh, **settings)
        yield ranks
        if not place.torchrun:
            ranks.submit(do="stop")
        ranks.close()


def _open_mesh(options: argparse.Namespace, place: Place) -> Any:
    """The mesh of `place`; rank 0 says for whom it waits."""
    from ..transport import open_mesh

    changes: dict[str, Any] = {"backend": _backend(options)}
    others: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if place.peers is not None:
        say(f"rank 0 of {place.world_size} waits for the others at {place.peers[0]}")
        changes["on_wait"] = Waiting(0, place.peers)
    elif place.rank == 0:
        others = working("rank 0 waits for the ranks that torchrun starts")
    with others:
        return open_mesh(
            connect_options(options, place.rank, place.world_size, place.peers, **changes)
        )
