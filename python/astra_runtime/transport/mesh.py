"""The interface between the engine and whatever carries its frames: N ranks, all connected."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from astra_runtime import wire
from astra_runtime.control import Control
from astra_runtime.core import _C
from astra_runtime.errors import AstraError, DeadlineExceeded, HandshakeRefused, anew
from astra_runtime.transport.options import ConnectOptions
from astra_runtime.transport.stats import Stats
from astra_runtime.wire import Frame

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from astra_runtime.transport.on_device import DeviceFrame

Payload = Frame | bytes | bytearray | memoryview
MoreTime = Callable[[tuple[int, ...], float], float]


class Mesh(ABC):
    """All ranks of one run. Collective use: each rank sends what its peers receive.

    After an AstraError the mesh is of no further use but to be closed, or connected again; but for
    errors that end one call alone, which `cancel` reports where a mesh `resumes`. One thread at a
    time uses a mesh; `close`, `abort` and `interrupt` may come from any.

    With `partial`, a call is best-effort: what a peer fails to do raises nothing, it is left out,
    and the caller sees by the ranks in the answer that it was. A frame that misses its deadline
    stays outstanding: it is read, checked and dropped before the next frame of that rank is looked
    at.

    Attributes:
        timeout: seconds; the deadline of every wait that names none.
        partial: whether this transport has best-effort calls, which can leave peers out.
        lossy: whether frames may be lost on their way although nobody failed.
        resumes: whether calls go on after one that was ended by `cancel`.
        call, request: how many calls have begun, and the host's number for the last one.
        missing_ranges: after a partial `receive`, of each rank whose frame arrived in part: the
            missing bytes [start, stop) of its payload, whose values mean nothing. Empty where
            frames arrive whole or not at all.
        lost: why nothing more arrives of a rank, for those that partial calls have found gone.
        options: the arguments of `connect`; None: made in another way.
        reconnect_factory: makes a mesh of `options` anew, with the former mesh's `store`; left by
            `connect`, for `reconnect`.
        store: torch.distributed's key-value store in which the ranks have met, where rank 0 has to
            go on serving it; None over sockets.
        keeper: while it lives, this process's sockets close the moment that the process dies,
            however much memory it holds; left by `connect`, where the system can do it.
        more_time: asked when a wait of this rank that leaves nobody out has come to its end, with
            the ranks that are missing and the seconds waited so far: how many more they get, 0.0:
            none. None: there are never more. Over sockets alone.
        device: where blocks' payloads may lie, made by `device_buffer` and received by
            `receive_on_device`, and never come to the host. None: this transport takes bytes.
    """

    rank: int
    world_size: int
    timeout: float
    partial: bool = False
    lossy: bool = False
    resumes: bool = False
    call: int = 0
    request: int | None = None
    options: ConnectOptions | None = None
    reconnect_factory: Callable[[ConnectOptions, Any], Mesh] | None = None
    store: Any = None
    keeper: _C.Keeper | None = None
    more_time: MoreTime | None = None
    device: torch.device | None = None

    @property
    def device_rank(self) -> int:
        """The rank by which errors name this process; a view may number its ranks otherwise."""
        return self.rank

    @property
    def ended(self) -> str | None:
        """Why this mesh can do nothing any more; None while it is open."""
        return None

    @property
    def missing_ranges(self) -> Mapping[int, Sequence[tuple[int, int]]]:
        return {}

    @property
    def gaps(self) -> Mapping[int, Sequence[tuple[int, int]]]:
        """Deprecated name of `missing_ranges`."""
        warnings.warn("Mesh.gaps is now missing_ranges", DeprecationWarning, stacklevel=2)
        return self.missing_ranges

    @property
    def lost(self) -> Mapping[int, AstraError]:
        return {}

    @property
    def encrypted(self) -> bool:
        """Whether all that this rank sends and receives is inside TLS."""
        return False

    @property
    @abstractmethod
    def stats(self) -> Stats:
        """A snapshot of what has crossed this rank's connections so far; subtract two of them."""

    @property
    @abstractmethod
    def peer_stats(self) -> dict[int, Stats]:
        """The same, for each peer."""

    def agree(
        self, fields: Mapping[str, str], exchanged: Mapping[str, str] | None = None
    ) -> dict[str, list[str]]:
        """Collective consistency check: compares the ranks' configuration fingerprints.

        fields: what must be alike on all ranks, by name. A difference raises HandshakeRefused on
        both sides. Ranks may load their models unequally fast: the wait is as long as the one for
        joining, where that is longer than `timeout`.
        exchanged: what may differ; all ranks have the same names. Returned of every rank, by name.
        """
        exchanged = exchanged or {}
        own = {**fields, **exchanged}
        for name, value in own.items():
            if not (isinstance(name, str) and isinstance(value, str)):
                raise TypeError(f"agree: expected names and values as text, got {name}: {value!r}")
        peers = peers_of(self)
        self.send(wire.encode_fields(own), block=Control.FINGERPRINT, plan=0, to=peers)
        sizes = dict.fromkeys(peers, wire.FIELDS_SIZE)
        patience = self.timeout
        if self.options is not None:
            patience = max(patience, self.options.connect_timeout)
        views = self.receive(sizes, block=Control.FINGERPRINT, plan=0, timeout=patience)
        by_rank = {rank: wire.decode_fields(views[rank], rank) for rank in sorted(views)}
        for rank, theirs in by_rank.items():
            difference = _difference(self.rank, own, rank, theirs, exchanged)
            if difference is not None:
                self.close()  # with BYE: peers still comparing must find the difference, not a loss
                raise HandshakeRefused(difference)
        by_rank[self.rank] = own
        return {name: [by_rank[rank][name] for rank in sorted(by_rank)] for name in exchanged}

    def alive(self) -> list[int]:
        """The ranks that answer, this one among them, ascending; without a call, from any thread.

        Over sockets a rank is missing as soon as its connection has ended, and when its machine has
        left a retransmission or a keepalive probe unanswered, so about 40 s after an idle one was
        cut off. What a process that does nothing would do is not seen: machines answer, not
        programs. torch.distributed shows a loss only to a call. After the end: this rank alone.

        Example:
            >>> from astra_runtime import local_mesh
            >>> [mesh.alive() for mesh in local_mesh(2)]
            [[0, 1], [0, 1]]
        """
        if self.ended is not None:
            return [self.rank]
        return [rank for rank in range(self.world_size) if rank not in self.lost]

    def disconnected(self) -> list[int]:
        """The ranks whose connections have ended, ascending; without a call, from any thread.

        What a killed process leaves is seen at once; unlike `alive`, one that is slow to answer is
        never taken for gone. After the end: all others.

        Example:
            >>> from astra_runtime import local_mesh
            >>> [mesh.disconnected() for mesh in local_mesh(2)]
            [[], []]
        """
        if self.ended is not None:
            return sorted(peers_of(self))
        return sorted(self.lost)

    def buffer(self, size: int) -> Frame:
        """A reusable frame of `size` payload bytes: write into `.payload`, then `send` it."""
        return Frame(size)

    @abstractmethod
    def send(
        self, payload: Payload, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        """Hands one frame to each rank in `to`, in that order, without waiting for the network.

        `block`: the Transformer block, or 0xFF00..0xFFEF for a control message; `plan`: 32-bit tag
        of what this call computes. The buffer may be written again when `send` has returned.
        `partial`: passes over ranks that cannot be reached any more.
        """

    @abstractmethod
    def receive(
        self,
        sizes: Mapping[int, int],
        *,
        block: int,
        plan: int,
        timeout: float | None = None,
        partial: bool = False,
    ) -> dict[int, memoryview]:
        """Waits for the frame of every rank in `sizes` (rank → expected payload bytes).

        The views may be written, and are valid until the next `receive` for a block of the same
        parity: a block's codes survive the next block's receive, not the one after. Control
        messages have a slot of their own. Watches every peer, waited for or not.

        `timeout`: seconds that this wait may take, instead of the mesh's. `partial`: ranks whose
        frame did not come in that time, or never will, are not in the answer.
        """

    def begin(self, request: int | None = None) -> None:
        """A new call begins; collective. `request`: the host's own number for it, 0 … 2⁶³ − 1.

        Every frame names the call and the request. What is left of an earlier call that ended early
        is read and dropped, a rank at another request raises RequestMismatch.
        """
        self.call += 1
        self.request = request

    def cancel(self, error: BaseException) -> None:
        """Ends the call that runs, on every rank, with the cause. Never raises.

        The mesh is as good as before where it `resumes`; where it does not, this is `abort`.
        """
        self.abort(error)

    def check_cancelled(self) -> None:  # noqa: B027
        """Raises the cause where a peer is known to have ended the call that runs; waits for
        nothing. For ranks that have all they need of their peers, and so read nothing of them."""

    def interrupt(self, reason: str, call: int) -> None:  # noqa: B027
        """Has a wait of that call end with CallEnded, where this transport can; from any thread or
        signal handler."""

    def end_early(self) -> None:  # noqa: B027
        """What is left of the call that runs will be dropped; `cancel` does it."""

    def device_buffer(self, size: int) -> DeviceFrame:
        """`buffer` on `device`."""
        raise NotImplementedError(f"{type(self).__name__} takes no payloads on a device")

    def receive_on_device(
        self, sizes: Mapping[int, int], *, block: int, plan: int, timeout: float | None = None
    ) -> dict[int, Tensor]:
        """`receive` of payloads that stay on `device`: uint8 tensors, for the current stream.

        Waits for nobody where there is no `timeout`, and judges no header: `check_received` does.
        Without sizes: has what was sent so far leave.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no payloads on a device")

    def check_later(self, flag: Tensor, error: AstraError) -> None:
        """Has `check_received` raise `error` if a bool tensor on `device` is False then."""
        raise NotImplementedError(f"{type(self).__name__} takes no payloads on a device")

    def check_received(self) -> None:  # noqa: B027
        """Waits for the payloads on `device` of the call that runs, and looks at their headers and
        at the flags of `check_later`. Raises what `receive` would have raised, the first of it."""

    @abstractmethod
    def flush(self) -> None:
        """Waits until everything sent was handed to the network."""

    @abstractmethod
    def close(self) -> None:
        """Says BYE, delivers what is unsent, frees everything. Never raises; may be repeated.

        May be called by any thread or signal handler: calls that run there or elsewhere end with an
        AstraError. Takes at most `timeout` for all peers together.
        """

    @abstractmethod
    def abort(self, error: BaseException) -> None:
        """Sends every peer the cause for which this rank fails, so that all fail alike, and closes.

        An error of this rank alone is a PeerLost(this rank) there. Never raises, takes no longer
        than 0.2 s, and does nothing on a closed mesh. A `with` block left by an exception does it.
        May be called by any thread or signal handler, as `close` may.
        """

    def reconnect(
        self, connect_timeout: float | None = None, *, check: Callable[[], None] | None = None
    ) -> Mesh:
        """Closes this mesh and makes the same one anew, with the arguments of its `connect`.

        Collective; a rank may be another process by now. Works in whatever state this mesh is.
        check: called again and again while other ranks are waited for, over sockets; what it raises
        ends the wait.
        Raises AstraError where the mesh was not made by `connect`, else what `connect` raises.
        """
        store = self.store
        self.close()
        self.store = store  # also for another try, if this one fails
        if self.options is None or self.reconnect_factory is None:
            raise AstraError(
                "reconnect: expected a mesh made by `connect`, which knows its arguments"
            )
        options = self.options
        if connect_timeout is not None:
            options = replace(options, connect_timeout=connect_timeout)
        mesh = self.reconnect_factory(replace(options, check=check), self.store)
        mesh.options = options
        return mesh

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a mesh holds this process's connections, and cannot be copied or pickled")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort(error if error is not None else kind())


def peers_of(mesh: Mesh) -> list[int]:
    """Every rank but this one, the next rank first, so that no receiver is everyone's first."""
    return [(mesh.rank + step) % mesh.world_size for step in range(1, mesh.world_size)]


def require(
    mesh: Mesh, views: Mapping[int, object], ranks: Iterable[int], block: int, seconds: float
) -> None:
    """After a partial `receive` of `seconds`: raises unless all of `ranks` are in `views`."""
    missing = tuple(sorted(rank for rank in ranks if rank not in views))
    for rank in missing:
        if rank in mesh.lost:
            raise anew(mesh.lost[rank])
    if missing:
        raise DeadlineExceeded(missing[0], block, seconds, missing)


def refuse_partial(partial: bool) -> None:
    """For transports whose `partial` is False."""
    if partial:
        raise ValueError("partial: expected False with this transport, which leaves nobody out")


def _difference(
    rank: int,
    fields: Mapping[str, str],
    peer: int,
    peer_fields: Mapping[str, str],
    may_differ: Container[str],
) -> str | None:
    for name in sorted({*fields, *peer_fields}):
        ours, theirs = fields.get(name), peer_fields.get(name)
        if ours != theirs and (name not in may_differ or theirs is None):
            return (
                f"rank {peer} has {f'{name} {theirs}' if theirs is not None else f'no {name}'}, "
                f"rank {rank} has {ours if ours is not None else 'none'}"
            )
    return None
