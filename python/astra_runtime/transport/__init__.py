"""How ranks reach each other: `connect` for processes, `local_mesh` for threads of one process."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Literal

from astra_runtime.core import _C
from astra_runtime.transport import handshake, rendezvous
from astra_runtime.transport.certificates import ENVIRONMENT, Keys, KeysError
from astra_runtime.transport.mesh import Mesh, Stats, peers_of, require
from astra_runtime.transport.pacing import Link, PacedMesh
from astra_runtime.transport.tcp import TcpMesh, prepare
from astra_runtime.wire import NO_RUN, NOBODY, Frame, Hello

__all__ = [
    "Frame",
    "Link",
    "Mesh",
    "Stats",
    "check_keys",
    "connect",
    "local_mesh",
    "peers_of",
    "require",
]


def connect(
    rank: int | None = None,
    world_size: int | None = None,
    peers: Sequence[str] | None = None,
    *,
    backend: Literal["tcp", "datagram", "gloo", "nccl"] = "tcp",
    host: str | None = None,
    timeout: float = 30.0,
    connect_timeout: float = 60.0,
    link: Link | None = None,
    keys: Keys | str | os.PathLike[str] | None = None,
    insecure: bool = False,
) -> Mesh:
    """Joins the mesh and returns it; blocks until every rank is there or `connect_timeout` ends.

    rank, world_size: this process and how many there are; default: torchrun's RANK, WORLD_SIZE.
    peers: "host:port" of every rank, by rank. This rank listens at exactly its own. Default: any
        free port, made known through torchrun's store at MASTER_ADDR:MASTER_PORT.
    backend: "tcp"; "datagram" for links that lose packets: codes by UDP, in parts of which any may
        be missing (`DatagramMesh`), the rest over TCP; or torch.distributed's "gloo" or "nccl"
        (`peers[0]` is then its rendezvous).
    host: the address to listen at instead of the one in `peers` (or of torchrun's interface).
    timeout: seconds every later wait may take. link: emulate a slow access link (`Link`).
    keys: a folder of `astra keys init`, all ranks' or this rank's part; default: the one that
        ASTRA_KEYS names. Every connection is then mutual TLS 1.3, and a peer counts only where its
        certificate names the rank that it claims to be.
    insecure: plaintext, even where ASTRA_KEYS is set.

    Plaintext never leaves the machine: without keys, or with `insecure`, an address off loopback
    raises KeysError (an AstraError and a ValueError). On loopback plaintext needs no word, so that
    ranks of one machine work without the package that makes keys; `astra demo` and `astra run`
    give the processes that they start keys of their own. Over "gloo" and "nccl" torch.distributed
    carries the frames, neither authenticated nor encrypted, and takes no keys.

    Raises:
        ConnectFailed: a port in use, ranks missing at the deadline.
        HandshakeRefused: a peer does not belong here, or this rank was refused: `reason`. At the
            side that accepts, a caller who cannot prove to be a rank ends nothing; was the rank
            still missing at the deadline, PeersRefused (both of the above) tells who was refused.
    """
    rank, world_size = _place(rank, world_size, peers)
    secret = _keys(keys, insecure)
    for name, wait in (("timeout", timeout), ("connect_timeout", connect_timeout)):
        if not 0 < wait <= 1e6:
            raise ValueError(f"{name}: expected seconds above 0, at most 1e6, got {wait}")
    paced = link is not None and not link.is_free
    if paced and backend == "datagram":
        raise ValueError('link: expected none with backend "datagram", which it cannot emulate')
    mesh: Mesh
    if backend in ("gloo", "nccl"):
        if keys is not None:
            raise KeysError(
                f"keys: expected none with backend {backend!r}, which has no use for any"
            )
        from astra_runtime.transport.distributed import connect_distributed

        mesh = connect_distributed(rank, world_size, peers, backend, timeout, connect_timeout)
    elif backend in ("tcp", "datagram"):
        mesh = _connect_tcp(rank, world_size, peers, host, timeout, connect_timeout, secret)
        if backend == "datagram":
            from astra_runtime.transport.datagram import connect_datagrams

            mesh = connect_datagrams(mesh)
    else:
        raise ValueError(f'backend: expected "tcp", "datagram", "gloo" or "nccl", got {backend!r}')
    if link is not None and paced:
        mesh = PacedMesh(mesh, link)

    def again(seconds: float | None) -> Mesh:
        return connect(
            rank,
            world_size,
            peers,
            backend=backend,
            host=host,
            timeout=timeout,
            connect_timeout=connect_timeout if seconds is None else seconds,
            link=link,
            keys=keys,
            insecure=insecure,
        )

    mesh.again = again
    if world_size > 1:
        with contextlib.suppress(OSError):  # peers then learn of a sudden death as late as ever
            mesh.keeper = _C.Keeper()
    return mesh


def check_keys(
    rank: int,
    peers: Sequence[str],
    keys: Keys | str | os.PathLike[str] | None = None,
    insecure: bool = False,
) -> None:
    """Raises the KeysError that `connect` over TCP would raise for these arguments."""
    secret = _keys(keys, insecure)
    if secret is not None:
        secret.contexts(rank)
    elif len(peers) > 1:
        _require_loopback(handshake.parse_address(peer)[0] for peer in peers)


def local_mesh(world_size: int, *, timeout: float = 30.0, link: Link | None = None) -> list[Mesh]:
    """All ranks of a TCP mesh over loopback in this process: one for each of `world_size` threads.

    The connections are made directly, without the handshake.
    """
    sockets: list[dict[int, socket.socket]] = [{} for _ in range(world_size)]
    for low in range(world_size):
        with handshake.listen("127.0.0.1", 0, low) as listener:
            for high in range(low + 1, world_size):
                dialer = socket.create_connection(listener.getsockname())
                listener.setblocking(True)
                accepted, _ = listener.accept()
                prepare(dialer)
                prepare(accepted)
                sockets[low][high], sockets[high][low] = accepted, dialer
    meshes: list[Mesh] = [
        TcpMesh(rank, world_size, sockets[rank], timeout=timeout) for rank in range(world_size)
    ]
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
    if not 1 <= world_size <= 0xFFFF:
        raise ValueError(f"world_size: expected 1..65535, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0..{world_size - 1}, got {rank}")
    if peers is not None and len(peers) != world_size:
        raise ValueError(f"peers: expected {world_size} addresses, got {len(peers)}")
    return rank, world_size


def _connect_tcp(
    rank: int,
    world_size: int,
    peers: Sequence[str] | None,
    host: str | None,
    timeout: float,
    connect_timeout: float,
    keys: Keys | None,
) -> TcpMesh:
    if world_size == 1:
        return TcpMesh(0, 1, {}, timeout=timeout)
    contexts = None if keys is None else keys.contexts(rank)
    run, store = NO_RUN, None
    if peers is not None:
        addresses = dict(enumerate(map(handshake.parse_address, peers)))
        if contexts is None:
            _require_loopback([name for name, _ in addresses.values()] + ([host] if host else []))
        own_host, port = addresses[rank]
        listener = handshake.listen(host or own_host, port, rank)
    else:
        if rendezvous.from_environment() is None:
            raise ValueError("peers: expected the address of every rank, got none")
        host = host or rendezvous.own_host()
        if contexts is None:
            _require_loopback([host])
        listener = handshake.listen(host, 0, rank)
    with listener:
        if peers is None:
            own = listener.getsockname()[:2]
            addresses, run, store = rendezvous.exchange_addresses(
                rank, world_size, own, connect_timeout
            )
            if contexts is None:
                _require_loopback([name for name, _ in addresses.values()])
        own_hello = Hello(world_size, rank, NOBODY, run)
        formation = handshake.Formation(own_hello, listener, addresses, contexts)
        streams = formation.run(connect_timeout)
    del store
    return TcpMesh(rank, world_size, streams, timeout=timeout, handshake=formation.stats)


def _keys(keys: Keys | str | os.PathLike[str] | None, insecure: bool) -> Keys | None:
    """The keys to use, from the argument or the environment; None: plaintext."""
    if insecure:
        if keys is not None:
            raise KeysError("insecure: expected without keys, got both")
        return None
    if keys is None:
        keys = os.environ.get(ENVIRONMENT) or None
    return keys if keys is None or isinstance(keys, Keys) else Keys(keys)


def _require_loopback(hosts: Iterable[str]) -> None:
    """Refuses plaintext where it would leave this machine."""
    for host in hosts:
        if not _is_loopback(host):
            raise KeysError(
                f"keys: expected a folder written by `astra keys init`, since {host} is not on "
                "loopback: plaintext stays on one machine"
            )


def _is_loopback(host: str) -> bool:
    """Whether everything that `host` may stand for is loopback; an unknown name is not."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)
