"""The mesh over torch.distributed: the same frames as uint8 tensors, header in front and checked.

The way to outgrow one machine's sockets: gloo on CPUs, NCCL between GPUs. torch.distributed shows
less than a socket does, so four things are weaker than over TCP: a lost peer is noticed only by a
wait for it, nothing says BYE, bytes are counted as handed over, not at the socket, and nothing is
authenticated or encrypted. With NCCL a
send is launched together with the next `receive`, `send` or `flush`: two ranks that both launched
their sends first would wait for each other. gloo aborts the process when a message is larger than
the buffer posted for it, so buffers are posted with room to spare and the header finds the fault.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup

from astra_runtime.errors import AstraError, ConnectFailed, DeadlineExceeded, PeerLost
from astra_runtime.transport import process_group
from astra_runtime.transport.mesh import Mesh, Payload, refuse_partial
from astra_runtime.transport.options import ConnectOptions
from astra_runtime.transport.peers import Channel, PeerMesh, slot
from astra_runtime.wire import HEADER_SIZE, Frame

ROOM: Final = 1 << 20  # bytes of the smallest buffer posted to gloo


class _Transfer(NamedTuple):
    """A tensor on its way. `work` has torch.distributed's `wait` and `is_completed`."""

    work: Any
    tensor: Tensor
    rank: int


class DistributedMesh(PeerMesh[Channel]):
    """`Mesh` over a process group of which every rank is a member.

    device: where the frames' tensors live; "cuda" for NCCL. batched: launch sends with receives.
    owned: `close` also destroys the default process group.
    """

    def __init__(
        self,
        group: ProcessGroup,
        *,
        timeout: float = 30.0,
        device: str = "cpu",
        batched: bool = False,
        owned: bool = False,
    ) -> None:
        own, size = group.rank(), group.size()
        channels = (Channel(own, rank) for rank in range(size) if rank != own)
        super().__init__(own, size, timeout, channels)
        self._group = group
        self._device = torch.device(device)
        self._batched = batched
        self._owned = owned
        self._staged: list[tuple[Tensor, int]] = []
        self._sending: deque[_Transfer] = deque()
        self._free: dict[int, list[Tensor]] = {}
        self._slots: dict[tuple[int, int], Tensor] = {}

    def send(
        self, payload: Payload, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        refuse_partial(partial)
        frame = payload if isinstance(payload, Frame) else Frame.of(payload)
        self._reap()
        self._launch([])
        for rank in to:
            channel = self._peer(rank)
            pool = self._free.setdefault(len(frame.data), [])
            tensor = pool.pop() if pool else self._empty(len(frame.data))
            data = channel.stamp(frame, block, plan)
            tensor.copy_(torch.frombuffer(data, dtype=torch.uint8))
            self._staged.append((tensor, rank))
            channel.stats.bytes_sent_total += len(data)
        if not self._batched:
            self._launch([])

    def receive(
        self,
        sizes: Mapping[int, int],
        *,
        block: int,
        plan: int,
        timeout: float | None = None,
        partial: bool = False,
    ) -> dict[int, memoryview]:
        refuse_partial(partial)
        wanted: list[tuple[Tensor, int]] = []
        for rank, size in sizes.items():
            self._peer(rank)
            wanted.append((self._slot(rank, slot(block), HEADER_SIZE + size), rank))
        transfers = self._launch(wanted)
        seconds = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        views = {}
        for transfer in transfers:
            self._wait(transfer, block, deadline, seconds)
            views[transfer.rank] = self._accept(transfer, sizes[transfer.rank], block, plan)
        self._reap()
        return views

    def _accept(self, transfer: _Transfer, size: int, block: int, plan: int) -> memoryview:
        """Checks the header of a frame that arrived and returns its payload."""
        received = transfer.tensor[: HEADER_SIZE + size].cpu().numpy()
        data: memoryview = received.data
        self._peers[transfer.rank].accept(data, size, block, plan)
        return data[HEADER_SIZE:]

    def _launch(self, receives: Sequence[tuple[Tensor, int]]) -> list[_Transfer]:
        """Starts the staged sends and `receives`; returns the transfers of the latter."""
        sends, self._staged = self._staged, []
        if not (sends or receives):
            return []
        group = self._group
        try:
            if self._batched and (sends or receives):
                ops = [P2POp(dist.isend, tensor, rank, group) for tensor, rank in sends]
                ops += [P2POp(dist.irecv, tensor, rank, group) for tensor, rank in receives]
                works = dist.batch_isend_irecv(ops)
                # NCCL returns one work for the whole batch.
                works = works * len(ops) if len(works) == 1 else works
            else:
                works = [group.send([tensor], rank, 0) for tensor, rank in sends]
                works += [group.recv([tensor], rank, 0) for tensor, rank in receives]
        except RuntimeError as error:
            rank = (*sends, *receives)[0][1]
            raise PeerLost(rank, None, process_group.first_line(error)) from error
        transfers = [
            _Transfer(work, tensor, rank)
            for work, (tensor, rank) in zip(works, (*sends, *receives), strict=True)
        ]
        self._sending.extend(transfers[: len(sends)])
        return transfers[len(sends) :]

    def _wait(
        self, transfer: _Transfer, block: int | None, deadline: float, seconds: float
    ) -> None:
        left = max(deadline - time.monotonic(), 1e-3)
        try:
            transfer.work.wait(timedelta(milliseconds=math.ceil(left * 1000)))
        except RuntimeError as error:
            raise self._failure(transfer.rank, block, error, seconds) from error

    def _failure(
        self, rank: int, block: int | None, error: RuntimeError, seconds: float
    ) -> AstraError:
        """torch.distributed has one exception for everything; its message says what happened."""
        text = str(error)
        if "imed out" in text or "timeout" in text:
            return DeadlineExceeded(rank, block, seconds)
        return PeerLost(rank, block, process_group.first_line(error))

    def _reap(self) -> None:
        """Takes back the buffers of sends that have completed."""
        while self._sending and self._sending[0].work.is_completed():
            tensor = self._sending.popleft().tensor
            self._free[tensor.numel()].append(tensor)

    def _slot(self, rank: int, index: int, total: int) -> Tensor:
        tensor = self._slots.get((rank, index))
        if tensor is None or tensor.numel() < total:
            tensor = self._slots[rank, index] = self._empty(max(total, ROOM))
        return tensor[:total] if self._batched else tensor

    def _empty(self, total: int) -> Tensor:
        # kept for later calls, which may come from outside of the caller's inference mode
        with torch.inference_mode(False):
            return torch.zeros(total, dtype=torch.uint8, device=self._device)

    def flush(self) -> None:
        self._launch([])
        deadline = time.monotonic() + self.timeout
        while self._sending:
            self._wait(self._sending[0], None, deadline, self.timeout)
            transfer = self._sending.popleft()
            self._free[transfer.tensor.numel()].append(transfer.tensor)

    def close(self) -> None:
        self._close(deliver=True)

    def abort(self, error: BaseException) -> None:
        """torch.distributed has no way to say why: peers see a loss, or wait for their deadline."""
        self._close(deliver=False)

    def reconnect(self, connect_timeout: float | None = None) -> Mesh:
        """As `Mesh.reconnect`; the process group is destroyed and made again.

        Raises AstraError where it is not `connect`'s own: a group that has lost a rank is of no use
        any more, and only who made it may destroy it.
        """
        if not self._owned:
            raise AstraError(
                "reconnect: expected a process group that `connect` has made, this one was there "
                "before: destroy it and make it again on every rank, then give the engine a new "
                "mesh, engine.rejoin(connect(backend=...))"
            )
        self._close(deliver=False)
        return super().reconnect(connect_timeout)

    def _close(self, *, deliver: bool) -> None:
        if self._closed:
            return
        self._closed = True
        if deliver:
            try:
                self.flush()
            except AstraError:
                self._sending.clear()  # the peer is gone or does not read: nothing more to do
        if self._owned:
            self._sending.clear()
            self._group.abort()  # whoever waits for this rank need not wait for the deadline
            del self._group  # its connections end with the last reference
            dist.destroy_process_group()


def connect_distributed(options: ConnectOptions, store: Any = None) -> DistributedMesh:
    """Joins torch.distributed's default group (made here unless it exists) and wraps it.

    The first address of `options.peers` is the rendezvous; None: torchrun's variables. `store`:
    that of the mesh before, which rank 0 goes on serving.
    """
    rank, world_size, backend = options.rank, options.world_size, options.backend
    owned = not dist.is_initialized()
    if owned:
        store = process_group.join(options, store)
    group = dist.group.WORLD
    if group is None or (group.rank(), group.size()) != (rank, world_size):
        raise ConnectFailed(f"the existing process group is not rank {rank} of {world_size}")
    nccl = backend == "nccl"
    device = f"cuda:{torch.cuda.current_device()}" if nccl else "cpu"
    mesh = DistributedMesh(group, timeout=options.timeout, device=device, batched=nccl, owned=owned)
    mesh.store = store if owned else None
    return mesh
