"""How ranks reach each other: `connect` for processes, `local_mesh` for threads of one process."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

from astra_runtime.core import _C
from astra_runtime.transport import rendezvous
from astra_runtime.transport.addresses import (
    parse_address,
    require_loopback,
    unreachable_for_others,
)
from astra_runtime.transport.bootstrap import MeshBootstrap
from astra_runtime.transport.credentials import Contexts, Keys
from astra_runtime.transport.link import Link
from astra_runtime.transport.mesh import Mesh, peers_of, require
from astra_runtime.transport.options import Backend, ConnectOptions
from astra_runtime.transport.pacing import PacedMesh
from astra_runtime.transport.sockets import listen, prepare
from astra_runtime.transport.stats import Stats
from astra_runtime.transport.tcp import TcpMesh
from astra_runtime.wire import NO_RUN, NOBODY, Frame, Hello

log = logging.getLogger("astra_runtime.transport")

__all__ = [
    "ConnectOptions",
    "Frame",
    "Link",
    "Mesh",
    "Stats",
    "check_keys",
    "connect",
    "local_mesh",
    "open_mesh",
    "peers_of",
    "require",
]


def connect(
    rank: int | None = None,
    world_size: int | None = None,
    peers: Sequence[str] | None = None,
    *,
    backend: Backend = "tcp",
    host: str | None = None,
    timeout: float = 30.0,
    connect_timeout: float = 60.0,
    link: Link | None = None,
    keys: Keys | str | os.PathLike[str] | None = None,
    insecure: bool = False,
) -> Mesh:
    """Joins the mesh and returns it; blocks until every rank is there or `connect_timeout` ends.

    Args:
        rank, world_size: this process and how many there are; None: torchrun's RANK, WORLD_SIZE.
        peers: "host:port" of every rank, by rank. This rank listens at exactly its own. None: any
            free port, made known through torchrun's store at MASTER_ADDR:MASTER_PORT.
        backend: "tcp"; "datagram" for links that lose packets: codes by UDP, in fragments of which
            any may be missing (`DatagramMesh`), the rest over TCP; or torch.distributed's "gloo" or
            "nccl" (`peers[0]` is then its rendezvous).
        host: the address to listen at instead of the one in `peers` (or of torchrun's interface).
        timeout: seconds that every later wait may take.
        connect_timeout: seconds to wait for the other ranks.
        link: emulates a slow access link; None: frames go as fast as they can.
        keys: a folder of `astra keys init`, all ranks' or this rank's part; None: the one that
            ASTRA_KEYS names. Every connection is then mutual TLS 1.3, and a peer counts only where
            its certificate names the rank that it claims to be.
        insecure: plaintext, even where ASTRA_KEYS is set.

    Plaintext never leaves the machine: without keys, or with `insecure`, an address off loopback
    raises KeysError (an AstraError and a ValueError). On loopback plaintext needs no word, so that
    ranks of one machine work without the package that makes keys; `astra demo` and `astra run`
    give the processes that they start keys of their own. Over "gloo" and "nccl" torch.distributed
    carries the frames, neither authenticated nor encrypted, and takes no keys: off loopback, or
    where ASTRA_KEYS names keys, it wants `insecure`.

    Raises:
        TypeError, ValueError: arguments that no mesh can have, before anything listens.
        ConnectFailed: a port in use, ranks missing at the deadline.
        HandshakeRefused: a peer does not belong here, or this rank was refused: `reason`. At the
            side that accepts, a caller who cannot prove to be a rank ends nothing; was the rank
            still missing at the deadline, PeersRefused (both of the above) tells who was refused.

    Example:
        with connect(0, peers=["127.0.0.1:7000", "127.0.0.1:7001"]) as mesh:
            with Engine(model, codebook, mesh) as engine:
                logits = engine(input_ids=ids).logits
    """
    if isinstance(peers, str):
        raise TypeError(f'peers: expected a list of "host:port", got the text {peers!r}')
    rank, world_size = _place(rank, world_size, peers)
    return open_mesh(
        ConnectOptions(
            rank,
            world_size,
            None if peers is None else tuple(peers),
            backend,
            host,
            timeout,
            connect_timeout,
            link,
            keys,
            insecure,
        )
    )


def open_mesh(options: ConnectOptions, store: Any = None) -> Mesh:
    """`connect` with its arguments in one object, which the mesh keeps.

    store: that of the mesh that this one replaces (`Mesh.store`).
    """
    keys = options.find_keys()
    mesh: Mesh
    if options.backend in ("gloo", "nccl"):
        from astra_runtime.transport.distributed import connect_distributed

        mesh = connect_distributed(options, store)
    else:
        contexts = None
        if keys is not None and options.world_size > 1:
            contexts = keys.contexts(options.rank)
        mesh = _connect_tcp(options, contexts)
        if options.backend == "datagram":
            from astra_runtime.transport.datagram import connect_datagrams

            mesh = connect_datagrams(mesh)
    if options.link is not None and options.paces:
        mesh = PacedMesh(mesh, options.link)
    mesh.options, mesh.reconnect_factory = options, open_mesh
    if options.world_size > 1:
        with contextlib.suppress(OSError):  # peers then learn of a sudden death as late as ever
            mesh.keeper = _C.Keeper()
    return mesh


def check_keys(
    rank: int,
    peers: Sequence[str],
    keys: Keys | str | os.PathLike[str] | None = None,
    insecure: bool = False,
    host: str | None = None,
) -> None:
    """Raises the KeysError that `connect` over TCP would raise for these arguments, and warns as it
    would, before a model is loaded."""
    options = ConnectOptions(
        rank, len(peers), tuple(peers), host=host, keys=keys, insecure=insecure
    )
    secret = options.find_keys()
    if secret is not None:
        secret.contexts(rank)
    elif len(peers) > 1:
        own = [] if options.host is None else [options.host]
        require_loopback([*(parse_address(peer)[0] for peer in peers), *own])
    addresses = dict(enumerate(map(parse_address, peers)))
    hint = unreachable_for_others(rank, options.host or addresses[rank][0], addresses)
    if hint:
        _warn_once(hint)


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


def local_mesh(world_size: int, *, timeout: float = 30.0, link: Link | None = None) -> list[Mesh]:
    """All ranks of a TCP mesh over loopback in this process: one for each of `world_size` threads.

    The connections are made directly, without the handshake.

    Args:
        world_size: how many ranks, 1 or more.
        timeout: seconds that every wait may take.
        link: emulates a slow access link of each rank.

    Raises:
        TypeError, ValueError: arguments that no mesh can have.

    Example:
        >>> [mesh.rank for mesh in local_mesh(2)]
        [0, 1]
    """
    ConnectOptions(0, world_size, timeout=timeout, link=link)  # refuses what no mesh can have
    sockets: list[dict[int, socket.socket]] = [{} for _ in range(world_size)]
    meshes: list[Mesh] = []
    with contextlib.ExitStack() as made:  # closed where descriptors run out on the way
        for low in range(world_size):
            with listen("127.0.0.1", 0, low)[0] as listener:
                for high in range(low + 1, world_size):
                    dialer = made.enter_context(socket.create_connection(listener.getsockname()))
                    listener.setblocking(True)
                    accepted = made.enter_context(listener.accept()[0])
                    prepare(dialer)
                    prepare(accepted)
                    sockets[low][high], sockets[high][low] = accepted, dialer
        for rank in range(world_size):
            mesh = TcpMesh(rank, world_size, sockets[rank], timeout=timeout)
            made.callback(mesh.abort, RuntimeError("a further rank could not be made"))
            meshes.append(mesh)
        made.pop_all()
    if link is None or link.is_free:
        return meshes
    return [PacedMesh(mesh, link) for mesh in meshes]


def _place(
    rank: int | None, world_size: int | None, peers: Sequence[str] | None
) -> tuple[int, int]:
    """This process's rank and the world size, from the arguments or from torchrun's variables."""
    if world_size is None and peers is not None:
        world_size = len(peers)
    if world_size == 1 and rank is None:
        rank = 0
    if rank is None or world_size is None:
        environment = rendezvous.from_environment()
        if environment is None:
            raise ValueError(
                "connect: expected rank, world_size and peers, or torchrun's variables "
                f"{', '.join(rendezvous.VARIABLES)}, got neither"
            )
        rank = environment[0] if rank is None else rank
        world_size = environment[1] if world_size is None else world_size
    return rank, world_size


def _connect_tcp(options: ConnectOptions, contexts: Contexts | None) -> TcpMesh:
    rank, world_size, timeout = options.rank, options.world_size, options.timeout
    if world_size == 1:
        return TcpMesh(0, 1, {}, timeout=timeout)
    run, store = NO_RUN, None
    addresses: dict[int, tuple[str, int]] = {}
    if options.peers is not None:
        addresses = dict(enumerate(map(parse_address, options.peers)))
        if contexts is None:
            require_loopback(host for host, _ in addresses.values())
    elif rendezvous.from_environment() is None:
        raise ValueError("peers: expected the address of every rank, got none")
    own_host, port = addresses.get(rank) or (options.host or rendezvous.own_host(), 0)
    host = options.host or own_host
    if contexts is None:
        require_loopback([host])
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listener) for listener in listen(host, port, rank)]
        if not addresses:
            addresses, run, store = _exchange_addresses(options, listeners[0])
            if contexts is None:
                require_loopback(host for host, _ in addresses.values())
        hint = unreachable_for_others(rank, host, addresses)
        if hint:
            _warn_once(hint)
        own_hello = Hello(world_size, rank, NOBODY, run)
        bootstrap = MeshBootstrap(own_hello, listeners, addresses, contexts, hint)
        streams = bootstrap.run(options.connect_timeout, options.on_wait, options.check)
    del store
    return TcpMesh(rank, world_size, streams, timeout=timeout, handshake=bootstrap.stats)


def _exchange_addresses(
    options: ConnectOptions, listener: socket.socket
) -> tuple[dict[int, tuple[str, int]], bytes, Any]:
    own = listener.getsockname()[:2]
    return rendezvous.exchange_addresses(
        options.rank, options.world_size, own, options.connect_timeout
    )
