"""torch.distributed's default process group, joined by the ranks, and joined again after a failure.

The ranks meet in a key-value store: rank 0's own, or that of torchrun's agent. There rank 0 opens a
*session* under a name that was never used before, each rank takes its place in it, and the group is
made when all are there, so that nobody reads what a former group has left. A rank that comes back
sooner than rank 0, which may not have noticed the failure yet, finds its place taken and tries
again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from astra_runtime.errors import ConnectFailed, HandshakeRefused
from astra_runtime.transport.addresses import is_loopback, parse_address
from astra_runtime.transport.options import ConnectOptions
from astra_runtime.transport.rendezvous import master, store_listener
from astra_runtime.wire import SAME_TRANSPORT

GLOO_TRIES: Final = 5
INTERFACE: Final = "GLOO_SOCKET_IFNAME"  # where gloo listens
LOOPBACK: Final = "lo"
PAUSE: Final = 0.05  # seconds between two looks for a new session
NEWS_SECONDS: Final = 1.0  # in which a rank reads what the other one has said


def join(options: ConnectOptions, store: Any = None) -> Any:
    """Makes the default group of all ranks; returns the store in which they have met.

    Rank 0 serves the store at the first address of `options.peers`; None: torchrun's variables say
    where. store: that of an earlier group, which rank 0 uses again: its port is free only when the
    last reference is gone, and the traceback of an error may hold one.

    Raises ConnectFailed, with the ranks that were `missing` after `options.connect_timeout`, and
    HandshakeRefused where a rank means another number of ranks.
    """
    backend, rank, world_size = options.backend, options.rank, options.world_size
    seconds = options.connect_timeout
    deadline = time.monotonic() + seconds
    try:
        private = all(map(is_loopback, options.meeting_hosts()))
        kept = store if rank == 0 else None
        store, session = _enter(rank, options.peers, deadline, kept, private=private)
        session.set(f"world/{rank}", str(world_size))
        _check_world(session, world_size, rank, 0)
        missing = _wait_for_all(session, world_size, deadline)
        if not missing:
            for other in range(world_size):
                _check_world(session, world_size, rank, other)
            limit = _limit(backend, deadline - time.monotonic())
            with _listening_on_loopback() if private else contextlib.nullcontext():
                dist.init_process_group(
                    backend, store=session, rank=rank, world_size=world_size, timeout=limit
                )
            return store
    except (RuntimeError, OSError, ValueError) as error:
        reason = f"rank {rank} could not join the {backend} group: {first_line(error)}"
        if rank:  # sockets of ours at rank 0 look like this
            reason += f"; if rank 0 runs, {SAME_TRANSPORT}"
        raise ConnectFailed(reason) from error
    who = ", ".join(map(str, missing))
    reason = f"rank {who} did not join the {backend} group in {seconds:g} s"
    raise ConnectFailed(f"{reason}; if it runs, {SAME_TRANSPORT}", missing)


def _enter(
    rank: int, peers: Sequence[str] | None, deadline: float, store: Any, *, private: bool
) -> tuple[Any, Any]:
    """The store, and the part of it that is the new session's."""
    host, port, served = _place(peers)
    while True:
        left = max(deadline - time.monotonic(), 1e-3)
        try:
            if store is None:
                serves = served and rank == 0
                store = dist.TCPStore(  # type: ignore[attr-defined]  # torch's stubs lack it
                    host,
                    port,
                    is_master=serves,
                    timeout=timedelta(seconds=left),
                    wait_for_workers=False,
                    master_listen_fd=store_listener(host, port) if serves and private else None,
                )
            base = PrefixStore(_prefix(), store)
            if rank == 0:
                base.set("session", secrets.token_hex(16))
            session = PrefixStore(base.get("session").decode(), base)
            if session.add(str(rank), 1) == 1:
                return store, session
            store, why = None, "its place is taken, and rank 0 opens no new session"
        except RuntimeError as error:  # also of a store that ends with its rank 0
            if rank == 0:
                raise
            store, why = None, first_line(error)
        if time.monotonic() + PAUSE > deadline:
            raise RuntimeError(why)
        time.sleep(PAUSE)


@contextlib.contextmanager
def _listening_on_loopback() -> Iterator[None]:
    """gloo listens at the address of the host's name, also where all ranks are on this machine."""
    if INTERFACE in os.environ or LOOPBACK not in (name for _, name in socket.if_nameindex()):
        yield
        return
    os.environ[INTERFACE] = LOOPBACK
    try:
        yield
    finally:
        del os.environ[INTERFACE]


def _limit(backend: str, seconds: float) -> timedelta:
    """The timeout of a group that has to stand in `seconds`. gloo takes it for each try to connect
    two ranks; waits for frames have limits of their own."""
    tries = GLOO_TRIES if backend == "gloo" else 1
    return timedelta(seconds=max(seconds / tries, 0.5))


def _wait_for_all(session: Any, world_size: int, deadline: float) -> tuple[int, ...]:
    """The ranks that have not come by the deadline."""
    left = timedelta(seconds=max(deadline - time.monotonic(), 1e-3))
    with contextlib.suppress(dist.DistStoreError):
        session.wait([str(n) for n in range(world_size)], left)
    return tuple(n for n in range(world_size) if not session.check([str(n)]))


def _check_world(session: Any, world_size: int, rank: int, other: int) -> None:
    """Raises HandshakeRefused where `other` means another number of ranks than this one, with which
    no group would ever be whole."""
    theirs = int(session.get(f"world/{other}"))
    if theirs == world_size:
        return
    # the store goes with rank 0: whichever of the two is first lets the other one find out, too
    with contextlib.suppress(RuntimeError):
        session.set(f"saw/{rank}/{other}", "")
        session.wait([f"saw/{other}/{rank}"], timedelta(seconds=NEWS_SECONDS))
    raise HandshakeRefused(
        f"world_size: expected the same on all ranks, got {world_size} here and {theirs} on "
        f"rank {other}"
    )


def _place(peers: Sequence[str] | None) -> tuple[str, int, bool]:
    """Where the store is, and whether rank 0 serves it."""
    if peers is not None:
        return (*parse_address(peers[0]), True)
    try:
        host, port = master()
    except KeyError as error:
        raise ValueError(f"expected peers, or torchrun's variable {error.args[0]}") from error
    return host, port, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _prefix() -> str:
    """Workers that torchrun starts again do not look for those before."""
    return f"astra/group/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
