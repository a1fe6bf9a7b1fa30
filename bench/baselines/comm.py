"""How the ranks of a baseline talk: three collectives, and what each puts on a rank's uplink.

Methods know `Comm` alone. `Collectives` builds it on one round of messages between all ranks,
`exchange`; a transport is that one function: gloo between processes, and threads of one process.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Shape = Sequence[int]


class Comm(Protocol):
    """One rank's view of the others. Calls are collective: all ranks make the same, in order.

    Attributes:
        bytes_sent: payload that this rank has put on its own uplink. A message to N − 1 peers
            counts N − 1 times; what a transport adds (headers, TCP, IP) does not count.
    """

    rank: int
    world_size: int
    bytes_sent: int

    def all_gather(self, tensor: Tensor, shapes: Sequence[Shape] | None = None) -> list[Tensor]:
        """Every rank's tensor, in the order of the ranks; N − 1 times the tensor is sent.

        Args:
            shapes: of each rank's tensor, known from the plan; None: all have the shape of this.
        """

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, which have one shape; the same bits on every rank.

        2·(N − 1)/N of the tensor is sent, the least there is, as a ring all-reduce sends it; for
        uneven parts that is the mean over the ranks.
        """

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """Sends parts[n] to rank n; returns what each rank sent here, of shapes[n]."""


class Collectives(ABC):
    """`Comm` on rounds of messages from every rank to every other.

    The all-reduce is a reduce-scatter and an all-gather of one round each. On a link where every
    rank reaches every other that is never slower than a ring, whose 2·(N − 1) rounds send the same
    bytes.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.bytes_sent = rank, world_size, 0

    @abstractmethod
    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """One round: parts[n] goes to rank n, what rank n sends here has shapes[n].

        Parts are contiguous, and may be empty. The own part may be left out or returned as it is.
        """

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        if len(parts) != self.world_size or len(shapes) != self.world_size:
            raise ValueError(
                f"parts, shapes: expected one for each of {self.world_size} ranks, "
                f"got {len(parts)} and {len(shapes)}"
            )
        parts = [part.contiguous() for part in parts]
        others = [n for n in range(self.world_size) if n != self.rank]
        self.bytes_sent += sum(parts[n].numel() * parts[n].element_size() for n in others)
        received = self.exchange(parts, shapes)
        return [parts[n] if n == self.rank else received[n] for n in range(self.world_size)]

    def all_gather(self, tensor: Tensor, shapes: Sequence[Shape] | None = None) -> list[Tensor]:
        shapes = [tensor.shape] * self.world_size if shapes is None else shapes
        if tuple(tensor.shape) != tuple(shapes[self.rank]):
            raise ValueError(
                f"tensor: expected shape {tuple(shapes[self.rank])} on rank {self.rank}, "
                f"got {tuple(tensor.shape)}"
            )
        return self.all_to_all([tensor] * self.world_size, shapes)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        parts = list(tensor.reshape(-1).tensor_split(self.world_size))
        mine = [parts[self.rank].shape] * self.world_size
        total = sum_in_order(self.all_to_all(parts, mine))
        sums = self.all_gather(total, [part.shape for part in parts])
        return torch.cat(sums).view(tensor.shape)


def sum_in_order(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


class GlooComm(Collectives):
    """Over torch.distributed: a gloo process group of which every rank is a member.

    Messages go straight from rank to rank: gloo's own all-gather takes equal sizes only, and goes
    round a ring. At the socket a message is 144 bytes longer than its payload: a header, and what
    both sides announce of their buffers.
    """

    def __init__(self, group: Any) -> None:
        super().__init__(group.rank(), group.size())
        self._group = group

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        others = [n for n in range(self.world_size) if n != self.rank]
        received = [part.new_empty(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]
        receiving = [n for n in others if received[n].numel()]
        sending = [n for n in others if parts[n].numel()]
        works = [self._group.recv([received[n]], n, 0) for n in receiving]
        works += [self._group.send([parts[n]], n, 0) for n in sending]
        for work in works:
            work.wait()
        return received


class ThreadComm(Collectives):
    """Ranks that are threads of one process; tensors are handed over as they are."""

    def __init__(self, rank: int, world_size: int, board: _Board) -> None:
        super().__init__(rank, world_size)
        self._board = board

    @classmethod
    def group(cls, world_size: int, timeout: float = 60.0) -> list[ThreadComm]:
        """All ranks; each belongs to one thread. A rank that waits for `timeout` s raises."""
        board = _Board(world_size, timeout)
        return [cls(rank, world_size, board) for rank in range(world_size)]

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        board = self._board
        board.parts[self.rank] = parts
        board.barrier.wait()
        received = [board.parts[n][self.rank] for n in range(self.world_size)]
        board.barrier.wait()  # the board is written again only when all have read it
        for n, (tensor, shape) in enumerate(zip(received, shapes, strict=True)):
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"shapes[{n}]: expected what rank {n} sends, {tuple(tensor.shape)}, "
                    f"got {tuple(shape)}"
                )
        return received


class _Board:
    def __init__(self, world_size: int, timeout: float) -> None:
        self.parts: list[Sequence[Tensor]] = [()] * world_size
        self.barrier = threading.Barrier(world_size, timeout=timeout)
