"""The mesh over torch.distributed: the same frames as uint8 tensors, header in front and checked.

The way to outgrow one machine's sockets: gloo on CPUs, NCCL between GPUs. torch.distributed shows
less than a socket does, so four things are weaker than over TCP: a lost peer is noticed only by a
wait for it, nothing says BYE, bytes are counted as handed over, not at the socket, and nothing is
authenticated or encrypted. With NCCL a send is launched together with the next `receive`, `send` or
`flush`: two ranks that both launched their sends first would wait for each other. Codes that were
made on a GPU stay on GPUs, see `on_device`. gloo aborts the process when a message is larger than
the buffer posted for it, so buffers are posted with room to spare and the header finds the fault.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup

from astra_runtime.errors import AstraError, ConnectFailed, DeadlineExceeded, PeerLost
from astra_runtime.transport import process_group
from astra_runtime.transport.buffers import BufferPool
from astra_runtime.transport.lifetime import CLOSED, aborted_by
from astra_runtime.transport.mesh import Mesh, Payload, refuse_partial
from astra_runtime.transport.on_device import Aside, DeviceFrame, LaterChecks
from astra_runtime.transport.options import MAX_SECONDS, ConnectOptions
from astra_runtime.transport.peers import Channel, PeerMesh, slot
from astra_runtime.transport.transfers import Transfer, Waiter, wait
from astra_runtime.wire import HEADER_SIZE, Frame

ROOM: Final = 1 << 20  # bytes of the smallest buffer posted to gloo
MAX_SENDING: Final = 16 << 20  # bytes on their way to peers that do not read before `send` waits
GRACE: Final = 1.0  # seconds that gloo has to say what went wrong, after a deadline
END_SECONDS: Final = 0.05  # for a thread to end, or to give a lock back


class DistributedMesh(PeerMesh[Channel]):
    """`Mesh` over a process group of which every rank is a member.

    device: where the frames' tensors live; "cuda" for NCCL. on_device: payloads may lie there, too.
    batched: launch sends with receives. owned: `close` also destroys the default process group.
    """

    def __init__(
        self,
        group: ProcessGroup,
        *,
        timeout: float = 30.0,
        device: str = "cpu",
        on_device: bool = False,
        batched: bool = False,
        owned: bool = False,
    ) -> None:
        own, size = group.rank(), group.size()
        channels = (Channel(own, rank) for rank in range(size) if rank != own)
        super().__init__(own, size, timeout, channels)
        self._group = group
        self._device = torch.device(device)
        self.device = self._device if on_device else None
        self._aside = Aside(self._device)
        self._arriving: list[tuple[Transfer, int]] = []  # to the device, and of which block
        self._later = LaterChecks()
        self._batched = batched
        self._owned = owned
        self._staged: list[tuple[Tensor, int]] = []
        self._changed = threading.Condition()  # guards what follows
        self._sending: deque[Transfer] = deque()
        self._sending_bytes = 0
        self._send_failure: tuple[int, RuntimeError] | None = None
        self._pool = BufferPool(self._empty)
        self._slots: dict[tuple[int, int], Tensor] = {}
        self._received: SimpleQueue[tuple[Transfer, RuntimeError | None] | None] = SimpleQueue()
        received = self._received
        self._receives = Waiter(lambda transfer, error: received.put((transfer, error)))
        self._sends = Waiter(self._sent)

    def send(
        self, payload: Payload, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        refuse_partial(partial)
        frame = payload if isinstance(payload, Frame) else Frame.of(payload)
        with self._lifetime:
            self._launch([])
            for rank in to:
                channel = self._peer(rank)
                with self._changed:
                    self._wait_for_sends(MAX_SENDING, block)
                    tensor = self._pool.take(HEADER_SIZE + frame.size)
                data = channel.stamp(frame, block, plan)
                if isinstance(frame, DeviceFrame):
                    frame.write(tensor)
                else:
                    tensor.copy_(torch.frombuffer(data, dtype=torch.uint8))
                self._staged.append((tensor, rank))
                channel.stats.bytes_sent_total += HEADER_SIZE + frame.size
            self._aside.follow()
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
        with self._lifetime:
            wanted: list[tuple[Tensor, int]] = []
            for rank, size in sizes.items():
                self._peer(rank)
                wanted.append((self._slot(rank, slot(block), HEADER_SIZE + size), rank))
            seconds = self.timeout if timeout is None else timeout
            views = {}
            for transfer in self._await(self._launch(wanted), block, seconds):
                views[transfer.rank] = self._accept(transfer, sizes[transfer.rank], block, plan)
            return {rank: views[rank] for rank in sizes}

    def begin(self, request: int | None = None) -> None:
        super().begin(request)
        self._arriving.clear()
        self._later.clear()

    def device_buffer(self, size: int) -> DeviceFrame:
        with torch.inference_mode(False):
            return DeviceFrame(size, self._device)

    def receive_on_device(
        self, sizes: Mapping[int, int], *, block: int, plan: int, timeout: float | None = None
    ) -> dict[int, Tensor]:
        with self._lifetime, torch.inference_mode(False):
            wanted = []
            for rank, size in sizes.items():
                self._peer(rank)
                # gloo needs room for a message of a wrong length
                room = size if self._batched else max(size, ROOM)
                with self._aside.launching():
                    tensor = torch.empty(HEADER_SIZE + room, dtype=torch.uint8, device=self._device)
                wanted.append((tensor, rank))
            transfers = self._launch(wanted)
            if self._aside.exists and timeout is None:
                for transfer in transfers:
                    transfer.work.wait()  # of the current stream, not of this thread
                self._arriving += [(transfer, block) for transfer in transfers]
            else:
                seconds = self.timeout if timeout is None else timeout
                deque(self._await(transfers, block, seconds), maxlen=0)
            payloads = {}
            for tensor, rank in wanted:
                self._aside.hand_over(tensor)
                expected = self._peers[rank].count_arriving(sizes[rank], block, plan)
                self._later.add_header(tensor[:HEADER_SIZE], expected)
                payloads[rank] = tensor[HEADER_SIZE : HEADER_SIZE + sizes[rank]]
            return payloads

    def check_later(self, flag: Tensor, error: AstraError) -> None:
        self._later.add_flag(flag, error)

    def check_received(self) -> None:
        with self._lifetime:
            self._launch([])
            deadline = time.monotonic() + self.timeout
            arriving, self._arriving = self._arriving, []
            for transfer, block in arriving:
                try:
                    wait(transfer, deadline)
                except RuntimeError as error:
                    raise self._failure(transfer.rank, block, error, self.timeout) from error
            self._later.run()

    def _await(
        self, transfers: Sequence[Transfer], block: int, seconds: float
    ) -> Iterator[Transfer]:
        """The transfers, as they end."""
        deadline = time.monotonic() + seconds
        if self._batched:  # NCCL has the stream of the thread that calls wait, so no other may
            for transfer in transfers:
                try:
                    wait(transfer, deadline)
                except RuntimeError as error:
                    raise self._failure(transfer.rank, block, error, seconds) from error
                yield transfer
            return
        waiting = {transfer.rank: transfer for transfer in transfers}
        for transfer in transfers:
            self._receives.add(transfer, deadline)
        while waiting:
            try:
                left = min(max(deadline + GRACE - time.monotonic(), 0.0), MAX_SECONDS)
                item = self._received.get(timeout=left)
            except Empty:
                ranks = tuple(sorted(waiting))
                raise DeadlineExceeded(ranks[0], block, seconds, ranks) from None
            self._lifetime.check()
            if item is None:
                continue
            transfer, failure = item
            if failure is not None:
                raise self._failure(transfer.rank, block, failure, seconds) from failure
            del waiting[transfer.rank]
            yield transfer

    def _accept(self, transfer: Transfer, size: int, block: int, plan: int) -> memoryview:
        """Checks the header of a frame that arrived and returns its payload."""
        received = transfer.tensor[: HEADER_SIZE + size].cpu().numpy()
        data: memoryview = received.data
        self._peers[transfer.rank].accept(data, size, block, plan)
        return data[HEADER_SIZE:]

    def _launch(self, receives: Sequence[tuple[Tensor, int]]) -> list[Transfer]:
        """Starts the staged sends and `receives`; returns the transfers of the latter."""
        sends, self._staged = self._staged, []
        if not (sends or receives):
            return []
        group = self._group
        try:
            if self._batched:
                ops = [P2POp(dist.isend, tensor, rank, group) for tensor, rank in sends]
                ops += [P2POp(dist.irecv, tensor, rank, group) for tensor, rank in receives]
                with self._aside.launching():
                    works = dist.batch_isend_irecv(ops)
                # NCCL returns one work for the whole batch.
                works = works * len(ops) if len(works) == 1 else works
            else:
                with self._aside.launching():
                    works = [group.send([tensor], rank, 0) for tensor, rank in sends]
                    works += [group.recv([tensor], rank, 0) for tensor, rank in receives]
        except RuntimeError as error:
            rank = (*sends, *receives)[0][1]
            raise PeerLost(rank, None, process_group.first_line(error)) from error
        transfers = [
            Transfer(work, tensor, rank)
            for work, (tensor, rank) in zip(works, (*sends, *receives), strict=True)
        ]
        with self._changed:
            for transfer in transfers[: len(sends)]:
                self._sending.append(transfer)
                self._sending_bytes += transfer.tensor.numel()
                self._sends.add(transfer, math.inf)
        return transfers[len(sends) :]

    def _sent(self, transfer: Transfer, error: RuntimeError | None) -> None:
        """A send has ended, and its buffer is free: in the order in which they were launched."""
        with self._changed:
            if self._sending:
                self._sending.popleft()
            size = transfer.tensor.numel()
            self._sending_bytes -= size
            if error is None:
                self._pool.give(transfer.tensor, size)
            elif self._send_failure is None:
                self._send_failure = transfer.rank, error
            self._changed.notify_all()

    def _wait_for_sends(self, most: int, block: int | None) -> None:
        """Waits until no more than `most` bytes are on their way; the lock is held."""
        if self._sending_bytes > most:
            done = self._changed.wait_for(
                lambda: self._sending_bytes <= most or self._send_failure or self.ended,
                self.timeout,
            )
            self._lifetime.check()
            if not done:
                raise DeadlineExceeded(self._sending[0].rank, block, self.timeout)
        if self._send_failure is not None:
            rank, error = self._send_failure
            raise self._failure(rank, block, error, self.timeout) from error

    def _failure(
        self, rank: int, block: int | None, error: RuntimeError, seconds: float
    ) -> AstraError:
        """torch.distributed has one exception for everything; its message says what happened."""
        text = str(error)
        if "imed out" in text or "timeout" in text:
            return DeadlineExceeded(rank, block, seconds)
        return PeerLost(rank, block, process_group.first_line(error))

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
        with self._lifetime:
            self._launch([])
            with self._changed:
                self._wait_for_sends(0, None)

    def close(self) -> None:
        if self.ended is None:
            with contextlib.suppress(AstraError):  # the peer is gone or does not read
                self.flush()
        self._end(CLOSED)
        self.store = None  # with the last reference rank 0 leaves its port

    def abort(self, error: BaseException) -> None:
        """torch.distributed has no way to say why: peers see a loss, or wait for their deadline."""
        self._end(aborted_by(error))

    def reconnect(
        self, connect_timeout: float | None = None, *, check: Callable[[], None] | None = None
    ) -> Mesh:
        """As `Mesh.reconnect`; the process group is destroyed and made again. Nothing ends that
        wait before its time, `check` neither.

        Raises AstraError where it is not `connect`'s own: a group that has lost a rank is of no use
        any more, and only who made it may destroy it.
        """
        if not self._owned:
            raise AstraError(
                "reconnect: expected a process group that `connect` has made, this one was there "
                "before: destroy it and make it again on every rank, then give the engine a new "
                "mesh, engine.rejoin(connect(backend=...))"
            )
        self._end(CLOSED)
        return super().reconnect(connect_timeout, check=check)

    def _end(self, reason: str) -> None:
        if not self._lifetime.end(reason):
            return
        self._received.put(None)  # wakes a wait of `receive`
        self._receives.stop()
        self._sends.stop()
        if self._changed.acquire(timeout=END_SECONDS):
            try:
                self._changed.notify_all()
            finally:
                self._changed.release()
        self._lifetime.finish()
        if self._owned:
            self._group.abort()  # whoever waits for this rank need not wait for the deadline
            del self._group  # its connections end with the last reference
            dist.destroy_process_group()
        self._receives.join(END_SECONDS)
        self._sends.join(END_SECONDS)


def connect_distributed(options: ConnectOptions, store: Any = None) -> DistributedMesh:
    """Joins torch.distributed's default group (made here unless it exists) and wraps it.

    The first address of `options.peers` is the rendezvous; None: torchrun's variables. `store`:
    that of the mesh before, which rank 0 goes on serving.
    """
    rank, world_size, backend = options.rank, options.world_size, options.backend
    owned = not dist.is_initialized()
    if owned:
        options.require_loopback_in_plaintext()
        store = process_group.join(options, store)
    group = dist.group.WORLD
    if group is None or (group.rank(), group.size()) != (rank, world_size):
        raise ConnectFailed(f"the existing process group is not rank {rank} of {world_size}")
    nccl = backend == "nccl"
    device = f"cuda:{torch.cuda.current_device()}" if nccl else "cpu"
    mesh = DistributedMesh(
        group,
        timeout=options.timeout,
        device=device,
        on_device=nccl,
        batched=nccl,
        owned=owned,
    )
    mesh.store = store if owned else None
    return mesh
