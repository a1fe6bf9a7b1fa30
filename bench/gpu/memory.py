"""Ranks as threads that exchange in one device's memory: the engine as it is over NCCL, on one GPU.

NCCL cannot put two ranks on one GPU. `MemoryGroup` stands in for its process group: it copies in a
stream of its own, behind what each side had queued when it launched its end, and a wait is of the
stream that waits. Unlike NCCL's, a wait also holds the thread until the other side has launched.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from astra_runtime.transport import Mesh
from astra_runtime.transport.distributed import DistributedMesh

R = TypeVar("R")
TIMEOUT = 60.0  # seconds


class End:
    """One side of a copy, with torch.distributed's `wait`."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.launched = _event(tensor)
        self.copied: Any = None
        self._matched = threading.Event()

    def match(self, copied: Any) -> None:
        self.copied = copied
        self._matched.set()

    def wait(self, limit: timedelta | None = None) -> None:
        """With a limit until the copy is done, else until it is queued before this stream's next
        work."""
        if not self._matched.wait(TIMEOUT if limit is None else limit.total_seconds()):
            raise RuntimeError("timed out")
        if self.copied is None:
            return
        torch.cuda.current_stream(self.tensor.device).wait_event(self.copied)
        if limit is not None:
            self.copied.synchronize()


def _event(tensor: Tensor) -> Any:
    if tensor.device.type != "cuda":
        return None
    return torch.cuda.current_stream(tensor.device).record_event()


@dataclass
class Memory:
    """What the groups of all ranks share: ends that wait for their other ends, by (from, to)."""

    device: torch.device
    lock: threading.Lock = field(default_factory=threading.Lock)
    sends: dict[tuple[int, int], deque[End]] = field(default_factory=lambda: defaultdict(deque))
    receives: dict[tuple[int, int], deque[End]] = field(default_factory=lambda: defaultdict(deque))
    stream: Any = None

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)

    def add(self, ends: dict[tuple[int, int], deque[End]], pair: tuple[int, int], end: End) -> End:
        with self.lock:
            ends[pair].append(end)
            if self.sends[pair] and self.receives[pair]:
                self._copy(self.sends[pair].popleft(), self.receives[pair].popleft())
        return end

    def _copy(self, send: End, receive: End) -> None:
        out = receive.tensor[: len(send.tensor)]
        if self.stream is None:
            out.copy_(send.tensor)
            copied = None
        else:
            with torch.cuda.stream(self.stream):
                for end in (send, receive):
                    self.stream.wait_event(end.launched)
                out.copy_(send.tensor)
                copied = self.stream.record_event()
        send.match(copied)
        receive.match(copied)


class MemoryGroup:
    """One rank's, with what a `DistributedMesh` uses of a process group."""

    def __init__(self, rank: int, size: int, memory: Memory) -> None:
        self._rank, self._size, self._memory = rank, size, memory

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int) -> End:
        return self._memory.add(self._memory.sends, (self._rank, rank), End(tensors[0]))

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int) -> End:
        return self._memory.add(self._memory.receives, (rank, self._rank), End(tensors[0]))


def run_on_device(world_size: int, device: torch.device, work: Callable[[Mesh], R]) -> list[R]:
    """Runs `work` as every rank, as `evaluate.run_ranks` does; results by rank."""
    memory, results, errors = Memory(device), dict[int, R](), list[BaseException]()

    def run(rank: int) -> None:
        group: Any = MemoryGroup(rank, world_size, memory)
        mesh = DistributedMesh(group, timeout=TIMEOUT, device=str(device), on_device=True)
        try:
            with mesh:
                results[rank] = work(mesh)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[n] for n in range(world_size)]
