"""Finding each other under torchrun: ranks publish their addresses in its key-value store."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
from datetime import timedelta
from typing import Any

from astra_runtime.errors import ConnectFailed
from astra_runtime.transport.addresses import parse_address

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_calls = itertools.count()  # a process may connect, close and connect again


def from_environment() -> tuple[int, int] | None:
    """(rank, world_size) as torchrun states them, or None outside of it."""
    if any(name not in os.environ for name in VARIABLES):
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def own_host() -> str:
    """The address of the interface that leads to MASTER_ADDR: loopback on a single machine."""
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, protocol, _, address = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket: this only looks up the route
        return str(probe.getsockname()[0])


def exchange_addresses(
    rank: int, world_size: int, address: tuple[str, int], seconds: float
) -> tuple[dict[int, tuple[str, int]], bytes, Any]:
    """Publishes this rank's address; returns everyone's, the run's 16 bytes, and the store.

    The caller holds the store until the mesh stands: by then every rank has read what it needs.
    """
    import torch.distributed as dist

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    prefix = f"astra/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_calls)}"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # torch's stubs leave it out
            host,
            port,
            is_master=rank == 0 and not agent,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
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
