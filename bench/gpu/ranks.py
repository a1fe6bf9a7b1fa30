"""Meshes for one device that is every rank in turn: one records, one has all of it ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from astra_runtime import Codebook, Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.transport import Frame, Mesh
from astra_runtime.transport.stats import Stats

Received = dict[tuple[int, int], bytes]  # by block or control number, and sender


class Recording(Mesh):
    """A mesh that keeps what its rank receives."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.rank, self.world_size = mesh, mesh.rank, mesh.world_size
        self.timeout = mesh.timeout
        self.received: Received = {}

    @property
    def stats(self) -> Stats:
        return self.mesh.stats

    @property
    def peer_stats(self) -> dict[int, Stats]:
        return self.mesh.peer_stats

    def send(self, payload: Any, **how: Any) -> None:
        self.mesh.send(payload, **how)

    def receive(
        self, sizes: Mapping[int, int], *, block: int, plan: int, **how: Any
    ) -> dict[int, memoryview]:
        views = self.mesh.receive(sizes, block=block, plan=plan, **how)
        self.received |= {(block, n): bytes(view) for n, view in views.items()}
        return views

    def flush(self) -> None:
        self.mesh.flush()

    def close(self) -> None:
        self.mesh.close()

    def abort(self, error: BaseException) -> None:
        self.mesh.abort(error)


class Replaying(Mesh):
    """A rank alone: what it receives lies ready, and what it sends goes nowhere.

    `sent`: payload bytes of each block, to all receivers together.
    """

    timeout = 60.0

    def __init__(self, rank: int, world_size: int, received: Received) -> None:
        self.rank, self.world_size = rank, world_size
        self.received = {key: memoryview(bytearray(data)) for key, data in received.items()}
        self.sent: dict[int, int] = {}

    @property
    def stats(self) -> Stats:
        return Stats()

    @property
    def peer_stats(self) -> dict[int, Stats]:
        return {}

    def agree(
        self, fields: Mapping[str, str], exchanged: Mapping[str, str] | None = None
    ) -> dict[str, list[str]]:
        """The ranks agreed when they were recorded, and were all like this one."""
        return {name: [value] * self.world_size for name, value in (exchanged or {}).items()}

    def send(
        self, payload: Any, *, block: int, plan: int, to: Sequence[int], partial: bool = False
    ) -> None:
        size = payload.size if isinstance(payload, Frame) else len(payload)
        self.sent[block] = size * len(to)

    def receive(
        self, sizes: Mapping[int, int], *, block: int, plan: int, **how: Any
    ) -> dict[int, memoryview]:
        return {n: self.received[block, n] for n in sizes}

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self, error: BaseException) -> None:
        pass


def record(
    model: nn.Module, codebook: Codebook, ids: torch.Tensor, world_size: int
) -> tuple[list[Received], torch.Tensor]:
    """What every rank receives in one call, and the call's logits [B, 1, V]."""

    def work(mesh: Mesh) -> tuple[Received, torch.Tensor]:
        recording = Recording(mesh)
        with Engine(model, codebook, recording) as engine:
            output = engine(input_ids=ids)
        return recording.received, output.logits

    ranks = run_ranks(world_size, work)
    return [received for received, _ in ranks], ranks[0][1]
