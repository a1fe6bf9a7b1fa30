"""Finding each other under torchrun: ranks publish their addresses in its key-value store."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
from datetime import timedelta
from typing import Any

from astra_runtime.errors import ConnectFailed
from astra_runtime.transport.addresses import is_loopback, parse_address
from astra_runtime.transport.sockets import listen

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_calls = itertools.count()  # a process may connect, close and connect again


def from_environment() -> tuple[int, int] | None:
    """(rank, world_size) as torchrun states them, or None outside of it."""
    if any(name not in os.environ for name in VARIABLES):
        return None
    return _integer("RANK"), _integer("WORLD_SIZE")


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"{name}: expected an integer, got {os.environ[name]!r}") from None


def master() -> tuple[str, int]:
    """Where torchrun's variables say that the ranks meet. KeyError: there are none."""
    host, port = os.environ["MASTER_ADDR"], _integer("MASTER_PORT")
    if not host or not 1 <= port <= 0xFFFF:
        raise ValueError(
            "MASTER_ADDR, MASTER_PORT: expected rank 0's host and a port of 1..65535, got "
            f"{host!r} and {port}"
        )
    return host, port


def own_host() -> str:
    """The address of the interface that leads to MASTER_ADDR: loopback on a single machine."""
    host, port = master()
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise ConnectFailed(f"MASTER_ADDR: {host!r} is not known here: {error}") from error
    family, kind, protocol, _, address = answers[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket: this only looks up the route
        return str(probe.getsockname()[0])


def store_listener(host: str, port: int) -> int:
    """A socket at which torch's store is to listen, where all ranks are on this machine: by itself
    it would at every address. Raises ConnectFailed."""
    first, *others = listen(host, port, 0)
    for listener in others:
        listener.close()
    return first.detach()


def exchange_addresses(
    rank: int, world_size: int, address: tuple[str, int], seconds: float
) -> tuple[dict[int, tuple[str, int]], bytes, Any]:
    """Publishes this rank's address; returns everyone's, the run's 16 bytes, and the store.

    The caller holds the store until the mesh stands: by then every rank has read what it needs.
    """
    import torch.distributed as dist

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = master()
    prefix = f"astra/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_calls)}"
    serves = rank == 0 and not agent
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # torch's stubs leave it out
            host,
            port,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=store_listener(host, port) if serves and is_loopback(host) else None,
        )
        if rank == 0:
            store.set(f"{prefix}/run", secrets.token_hex(16))
        store.set(f"{prefix}/{rank}", f"[{address[0]}]:{address[1]}")
        run = bytes.fromhex(store.get(f"{prefix}/run").decode())
        texts = {peer: store.get(f"{prefix}/{peer}").decode() for peer in range(world_size)}
    except RuntimeError as error:  # the store's own errors, its timeout among them
        first = str(error).splitlines()[0]
        raise ConnectFailed(f"rank {rank} found no peers at {host}:{port}: {first}") from error
    return {peer: parse_address(text) for peer, text in texts.items()}, run, store
