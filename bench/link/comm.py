"""The collectives that the baselines use, on the virtual link's clock."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from astra_runtime.transport import peers_of
from bench.baselines.comm import Collectives
from bench.link.virtual import VirtualMesh


class VirtualComm(Collectives):
    """A rank's collectives over raw tensors, with no header of their own.

    What they compute, such as sums, is executed and timed; copies into and out of the network are
    not, as sockets would make them (`SocketCosts`). Messages go straight to their receivers, to the
    next rank first, so that no receiver is everyone's first.

    Args:
        ring: all-reduce in 2·(N − 1) steps that each pass 1/N of the tensor to the next rank, as
            rings of collective libraries do. Off: `Collectives`' two rounds, which send the same
            bytes and wait for fewer round trips.
    """

    def __init__(self, mesh: VirtualMesh, *, ring: bool = False) -> None:
        super().__init__(mesh.rank, mesh.world_size)
        self._mesh, self._ring = mesh, ring
        self._peers = peers_of(mesh)

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        received = list(parts)
        with self._mesh.state.off_clock():
            copies = {id(part): part.detach().clone() for part in parts}  # often one for all
            for peer in self._peers:
                part = copies[id(parts[peer])]
                if part.numel():
                    size = part.numel() * part.element_size()
                    self._mesh.world.post(self._mesh.state, peer, size, part)
            empty = parts[self.rank].new_empty
            sources = []
            for peer in self._peers:
                received[peer] = empty(tuple(shapes[peer]))
                if received[peer].numel():
                    sources.append(peer)
            messages = self._mesh.world.await_from(self._mesh.state, sources, None)
            for peer, message in zip(sources, messages, strict=True):
                received[peer].copy_(message.content)
        return received

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if not self._ring:
            return super().all_reduce(tensor)
        size, rank = self.world_size, self.rank
        total = tensor.detach().clone().contiguous()
        parts = total.view(-1).tensor_split(size)
        for step in range(size - 1):
            parts[(rank - step - 1) % size].add_(self._pass_on(parts, rank - step))
        for step in range(size - 1):
            parts[(rank - step) % size].copy_(self._pass_on(parts, rank + 1 - step))
        return total

    def _pass_on(self, parts: Sequence[Tensor], index: int) -> Tensor:
        """Sends a part to the next rank, and returns the one before it, which comes round."""
        size = self.world_size
        none = parts[0][:0]
        sent = [none] * size
        shapes: list[Sequence[int]] = [(0,)] * size
        sent[(self.rank + 1) % size] = parts[index % size]
        shapes[(self.rank - 1) % size] = parts[(index - 1) % size].shape
        return self.all_to_all(sent, shapes)[(self.rank - 1) % size]
