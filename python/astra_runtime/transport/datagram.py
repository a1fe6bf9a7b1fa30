"""Codes as datagrams, for links that lose packets: no head-of-line blocking.

TCP delivers in order, so one lost packet holds up all that was sent behind it, for a round trip at
best and 200 ms or more at worst. Codes of a block are of use now or not at all. `DatagramMesh`
sends the frames of blocks as UDP datagrams and leaves everything else (control messages, gathered
answers, how peers are lost) to the TCP mesh that it wraps, over which the datagrams' secrets are
agreed. What is missing when a wait ends is in `missing_ranges`, and the caller goes on without it.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from astra_runtime.control import Control, is_control
from astra_runtime.errors import (
    AstraError,
    ConnectFailed,
    DeadlineExceeded,
    HandshakeRefused,
    PeerLost,
    WireError,
    anew,
)
from astra_runtime.transport.abort import error_at_end
from astra_runtime.transport.certificates import EXTRA, can_make_keys
from astra_runtime.transport.connection import FINISHED
from astra_runtime.transport.credentials import KeysError
from astra_runtime.transport.fragments import DATAGRAM_SIZE, FEC_GROUP, DatagramStats, Outbox
from astra_runtime.transport.mesh import Payload
from astra_runtime.transport.peers import Peer, PeerMesh
from astra_runtime.transport.reassembly import ByteRange, Inbox
from astra_runtime.transport.seals import SECRET_SIZE, Buffer, EncryptedSeal, PlainSeal, Seal
from astra_runtime.transport.stats import Stats
from astra_runtime.transport.tcp import YIELD_NANOSECONDS, TcpMesh
from astra_runtime.wire import SAME_TRANSPORT, Frame

SOCKET_BUFFER: Final = 4 << 20  # asked of the kernel, which may give less
MAX_UNSENT: Final = 1 << 20  # bytes kept for a peer while the kernel takes none
PROBES: Final = 8  # datagrams that test the path before it is relied on
PROBE_SECONDS: Final = 0.01  # between two of them
PAUSE: Final = 0.25  # of a wait: so long after its last fragment a begun frame is given up
FLUSH_SECONDS: Final = 2.0  # for datagrams that are unsent when the mesh is closed
_TURN: Final = 1024  # datagrams of one peer read before another's
_OFFER: Final = struct.Struct(f"<HB{SECRET_SIZE}s")  # see `_exchange_secrets`
_OTHER_FRAME: Final = ("call", "request", "plan", "block")  # fields by which it differs first


class _Peer(Peer):
    """One connected UDP socket: what comes from and goes to one peer, and nobody else."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        super().__init__(rank)
        self.sock = sock
        self.fd = sock.fileno()
        self.inbox = Inbox(rank, PlainSeal(bytes(SECRET_SIZE)))
        self.outbox = Outbox(rank, PlainSeal(bytes(SECRET_SIZE)))
        self.unsent: deque[bytes] = deque()
        self.unsent_bytes = 0
        self._room = memoryview(bytearray(DATAGRAM_SIZE + 1))  # one byte more betrays the longer

    def transmit(self, datagram: Sequence[Buffer]) -> None:
        """Sends now or keeps for later; what has no room is lost, as it might be on its way."""
        if not self.unsent and self._send(datagram):
            return
        whole = b"".join(datagram)
        if self.unsent_bytes + len(whole) > MAX_UNSENT:
            self.inbox.stats.dropped += 1
            return
        self.unsent.append(whole)
        self.unsent_bytes += len(whole)

    def flush(self) -> bool:
        """Sends what it can of the unsent datagrams; True when none are left."""
        while self.unsent:
            if not self._send([self.unsent[0]]):
                return False
            self.unsent_bytes -= len(self.unsent.popleft())
        return True

    def _send(self, datagram: Sequence[Buffer]) -> bool:
        """False: the kernel has no room at the moment."""
        try:
            self.stats.bytes_sent_total += self.sock.sendmsg(datagram)
            self.inbox.stats.sent += 1
        except BlockingIOError:
            return False
        except OSError:  # unreachable, refused: TCP knows whether the peer is alive
            self.inbox.stats.dropped += 1
        return True

    def collect(self) -> bool:
        """Takes what has arrived; False where there may be more."""
        for _ in range(_TURN):
            try:
                count = self.sock.recv_into(self._room)
            except BlockingIOError:
                return True
            except OSError:  # an answer to something sent before: nobody listens there
                continue
            self.stats.bytes_received_total += count
            self.inbox.take(self._room[:count])
        return False


def connect_datagrams(
    control: TcpMesh, *, fec_group: int = FEC_GROUP, connect_timeout: float = 10.0
) -> DatagramMesh:
    """Wraps a mesh that was just made, on every rank: its block frames become datagrams. Closes it
    on failure.

    Each rank sends each peer, over its connection, a port and a fresh secret to send with; then
    datagrams probe the path. With TLS the secrets are keys of AES-256-GCM. Without, so on loopback
    only, they are tokens, see `PlainSeal`. To as many as `fec_group` fragments of a frame (1 to
    255; 0: never) this rank adds one by which any one of them can be recovered.

    Raises:
        KeysError: encryption without the package `cryptography`.
        HandshakeRefused: a peer that does not send datagrams.
        ConnectFailed: no datagram of a peer came within `connect_timeout` seconds.
    """
    if not 0 <= fec_group <= 255:
        raise ValueError(f"fec_group: expected 0..255, got {fec_group}")
    if control.encrypted and not can_make_keys():
        error = KeysError(
            f'datagrams beside TLS need the package cryptography: pip install "{EXTRA}"'
        )
        control.abort(error)
        raise error
    mesh = DatagramMesh(control)
    try:
        patience = max(control.timeout, connect_timeout)
        mesh._exchange_secrets(fec_group, patience)
        mesh._probe_paths(connect_timeout)
    except BaseException as error:
        mesh.abort(error)
        raise
    return mesh


class DatagramMesh(PeerMesh[_Peer]):
    """`Mesh` over UDP for the frames of blocks and over a TCP mesh for the rest.

    Attributes:
        missing_ranges: after a `receive`: of every rank whose frame arrived in part, the missing
            bytes [start, stop) of its payload, which are zeros in its view.
    """

    partial, lossy = True, True

    def __init__(self, control: TcpMesh) -> None:
        peers = [_Peer(n, _bound_beside(to.sock)) for n, to in control.connections.items()]
        super().__init__(control.rank, control.world_size, control.timeout, peers)
        self._control = control
        self._missing_ranges: dict[int, list[ByteRange]] = {}
        self._lost: dict[int, AstraError] = {}
        self._by_fd = {peer.fd: peer for peer in peers}
        self._lifetime = control.lifetime
        self._lifetime.resources += [peer.sock for peer in peers]

    def _exchange_secrets(self, fec_group: int, patience: float) -> None:
        """Each sends each, over their connection: the port to send to, the FEC group it will send
        with, and the secret that it will open datagrams with."""
        seal: type[Seal] = EncryptedSeal if self.encrypted else PlainSeal
        for rank, peer in self._peers.items():
            secret = os.urandom(SECRET_SIZE)
            peer.inbox.seal = seal(secret)  # type: ignore[call-arg]
            offer = _OFFER.pack(peer.sock.getsockname()[1], fec_group, secret)
            self._control.send(offer, block=Control.DATAGRAMS, plan=0, to=[rank])
        sizes = dict.fromkeys(self._peers, _OFFER.size)
        for rank, theirs in self._offers(sizes, patience).items():
            peer = self._peers[rank]
            port, peer.inbox.fec_group, secret = _OFFER.unpack(theirs)
            peer.outbox = Outbox(self.rank, seal(secret), fec_group)  # type: ignore[call-arg]
            host, _, *rest = self._control.connections[rank].sock.getpeername()
            peer.sock.connect((host, port, *rest))

    def _offers(self, sizes: Mapping[int, int], patience: float) -> dict[int, memoryview]:
        """What the peers offer. A rank over TCP alone goes on with something else, or is silent."""
        kind, control = Control.DATAGRAMS, self._control
        try:
            return control.receive(sizes, block=kind, plan=0, timeout=patience)
        except WireError as error:
            # what another rank reports of this one is no frame of its own
            if error.field not in _OTHER_FRAME or error.rank == self.rank:
                raise
            raise self._sends_none(error.rank, "") from error
        except DeadlineExceeded as error:
            raise self._sends_none(error.rank, f" within {error.seconds:g} s") from error
        except PeerLost as error:
            if error.detail != FINISHED:
                raise
            raise self._sends_none(error.rank, " before it finished and said BYE") from error

    def _sends_none(self, other: int | None, when: str) -> HandshakeRefused:
        return HandshakeRefused(
            f"rank {other} sends no datagrams{when}, rank {self.rank} does: {SAME_TRANSPORT}"
        )

    def _probe_paths(self, connect_timeout: float) -> None:
        """Finds out at once, not by degraded answers, where nothing passes."""
        deadline = time.monotonic() + max(connect_timeout, PROBES * PROBE_SECONDS)
        silent, turn = list(self._peers.values()), 0
        while silent or turn < PROBES:
            if time.monotonic() > deadline:
                ranks = tuple(sorted(peer.rank for peer in silent))
                who = ", ".join(map(str, ranks))
                raise ConnectFailed(
                    f"no datagram of rank {who} came within {connect_timeout:g} s although TCP "
                    "connects: does a firewall keep UDP from passing?",
                    ranks,
                )
            for peer in self._peers.values():
                peer.transmit(peer.outbox.probe())
            turn += 1
            time.sleep(PROBE_SECONDS)
            for peer in self._peers.values():
                peer.collect()
            silent = [peer for peer in silent if not peer.inbox.probed]

    @property
    def missing_ranges(self) -> Mapping[int, Sequence[ByteRange]]:
        return self._missing_ranges

    @property
    def lost(self) -> Mapping[int, AstraError]:
        return {**self._control.lost, **self._lost}

    def alive(self) -> list[int]:
        alive = self._control.alive()
        return [rank for rank in alive if rank not in self._lost]

    def disconnected(self) -> list[int]:
        return sorted({*self._control.disconnected(), *self._lost})

    @property
    def encrypted(self) -> bool:
        return self._control.encrypted

    @property
    def stats(self) -> Stats:
        return super().stats + self._control.stats

    @property
    def peer_stats(self) -> dict[int, Stats]:
        below = self._control.peer_stats
        return {rank: stats + below[rank] for rank, stats in super().peer_stats.items()}

    @property
    def datagrams(self) -> DatagramStats:
        """A snapshot of what became of the datagrams so far."""
        return sum((peer.inbox.stats for peer in self._peers.values()), DatagramStats())

    def interrupt(self, reason: str, call: int) -> None:
        self._control.interrupt(reason, call)

    def begin(self, request: int | None = None) -> None:
        super().begin(request)
        self._control.begin(request)

    def send(
        self, payload: Payload, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        if is_control(block):
            self._control.send(payload, block=block, plan=plan, to=to, partial=partial)
            return
        with self._lifetime:
            self._send(payload, block, plan, to, partial)

    def _send(
        self, payload: Payload, block: int, plan: int, to: Sequence[int], partial: bool
    ) -> None:
        self._control.block = block  # for its abort frame
        content = payload.payload if isinstance(payload, Frame) else memoryview(payload).cast("B")
        for rank in to:
            peer = self._living(rank, partial)
            peer.flush()
            for datagram in peer.outbox.frame(content, block, plan):
                peer.transmit(datagram)
            peer.stats.count_sent(len(content), block)

    def receive(
        self,
        sizes: Mapping[int, int],
        *,
        block: int,
        plan: int,
        timeout: float | None = None,
        partial: bool = False,
    ) -> dict[int, memoryview]:
        """As `Mesh.receive`. A partial wait ends before its deadline where what is missing must be
        lost (`Inbox.remaining_wait`); other waits for a lost fragment end in DeadlineExceeded."""
        self._missing_ranges = {}
        if is_control(block):
            return self._control.receive(
                sizes, block=block, plan=plan, timeout=timeout, partial=partial
            )
        with self._lifetime:
            seconds = self.timeout if timeout is None else timeout
            return self._receive(sizes, block, plan, seconds, partial)

    def _receive(
        self, sizes: Mapping[int, int], block: int, plan: int, seconds: float, partial: bool
    ) -> dict[int, memoryview]:
        self._control.block = block
        wanted = {rank: self._living(rank, partial) for rank in sizes}
        for rank, peer in wanted.items():
            peer.inbox.expect(sizes[rank], block, plan)
        left = self._wait(list(wanted.values()), block, seconds, partial)
        if left and not partial:
            ranks = tuple(sorted(peer.rank for peer in left))
            raise DeadlineExceeded(ranks[0], block, seconds, ranks)
        views = {}
        for rank, peer in wanted.items():
            frame = peer.inbox.finish()
            if frame is None:
                continue
            views[rank], ranges = frame
            if ranges:
                self._missing_ranges[rank] = ranges
            missing = sum(stop - start for start, stop in ranges)
            peer.stats.count_received(sizes[rank] - missing, block)
        return views

    def _wait(self, waiting: list[_Peer], block: int, seconds: float, partial: bool) -> list[_Peer]:
        """Takes datagrams until nothing is worth waiting for; returns who is still missing."""
        deadline = time.monotonic() + seconds
        pause = seconds * PAUSE if partial else math.inf
        waiting = self._still_missing(waiting, partial, pause)
        if self._control.may_yield:
            until = time.perf_counter_ns() + YIELD_NANOSECONDS
            while waiting and time.perf_counter_ns() < until:
                os.sched_yield()
                self._lifetime.check()
                waiting = self._still_missing(waiting, partial, pause)
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if partial:
                left = min([left, *(peer.inbox.remaining_wait(pause) for peer in waiting)])
            self._sleep(left, block, partial)
            waiting = self._still_missing(waiting, partial, pause)
        return waiting

    def _still_missing(self, waiting: list[_Peer], partial: bool, pause: float) -> list[_Peer]:
        """Who is still to be waited for, after all that has arrived was taken."""
        left = []
        for peer in waiting:
            taken = peer.collect()
            lost = taken and not peer.inbox.remaining_wait(pause)
            given_up = partial and (self._gone(peer.rank) or lost)
            if not (peer.inbox.whole or given_up):
                left.append(peer)
        return left

    def _sleep(self, seconds: float, block: int, partial: bool) -> None:
        """Waits for datagrams, and sees to the connections: a peer may be lost, bytes unsent."""
        events = {
            peer.fd: select.POLLIN if peer.flush() else select.POLLIN | select.POLLOUT
            for peer in self._peers.values()
        }
        ready, ended = self._control.attend(events, seconds, block, partial)
        for fd in ready:
            self._by_fd[fd].collect()
        for connection in ended:
            cause = error_at_end(
                connection.stream, connection.rank, block, "it closed the connection"
            )
            if cause is not None:
                self._lost[connection.rank] = cause

    def _gone(self, rank: int) -> AstraError | None:
        return self._lost.get(rank) or self._control.lost.get(rank)

    def _living(self, rank: int, partial: bool) -> _Peer:
        peer = self._peer(rank)
        cause = self._gone(rank)
        if cause is not None and not partial:
            raise anew(cause)
        return peer

    def flush(self) -> None:
        deadline = time.monotonic() + self.timeout
        with self._lifetime:
            self._flush_datagrams(deadline)
        self._control.flush()

    def _flush_datagrams(self, deadline: float) -> None:
        """What the kernel takes no datagram of by the deadline is lost."""
        for peer in self._peers.values():
            while not peer.flush() and time.monotonic() < deadline:
                select.select([], [peer.fd], [], 0.01)
                self._lifetime.check()

    def close(self) -> None:
        with contextlib.suppress(AstraError, OSError), self._lifetime:
            self._flush_datagrams(time.monotonic() + min(self.timeout, FLUSH_SECONDS))
        self._control.close()

    def abort(self, error: BaseException) -> None:
        self._control.abort(error)


def _bound_beside(connection: socket.socket) -> socket.socket:
    """A UDP socket at the address that a connection has here, at a port of its own."""
    sock = socket.socket(connection.family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
    host, _, *rest = connection.getsockname()
    sock.bind((host, 0, *rest))
    return sock
