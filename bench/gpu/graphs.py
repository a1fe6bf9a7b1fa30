"""A rank's call as CUDA graphs: one for all that a device does between two exchanges.

A call is captured once, cut where codes leave and where they arrive, and replayed without the
model, its hooks or any Python between a graph's kernels. What a replay does on the host has to be
done there: it copies codes out, waits for them, copies received codes in, and starts the next
graph. Each block is two graphs on a rank that sends: up to its codes, and local attention, which
runs while they are copied. For codecs that send something in every block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from astra_runtime import Engine, engine, outgoing
from astra_runtime.call import Call
from astra_runtime.codes.base import Pending
from astra_runtime.codes.staging import Staging
from astra_runtime.layer import Layer


class Graphs:
    """Graphs that are captured one after the other and replayed in that order, in one memory."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graphs.append(graph)

    def end(self) -> Callable[[], None]:
        """Ends the capture; what is returned replays it."""
        self._graphs[-1].capture_end()
        return self._graphs[-1].replay

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Work in here goes to the stream that is captured."""
        return torch.cuda.stream(self.stream)


class NoGraphs:
    """The same on a CPU: what would be captured runs, and a replay does nothing."""

    def begin(self) -> None:
        pass

    def end(self) -> Callable[[], None]:
        return lambda: None

    def running(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class Pieces:
    """The steps of a captured call; in place of a codec's `Staging` while it is captured.

    Attributes:
        steps: what a replay does, in order.
        num_graphs: how many of them are graphs.
        hidden: the final hidden states of this rank, [B, L, D]; on a GPU a replay writes them.
        want: the same from a call that was not captured.
    """

    hidden: Tensor
    want: Tensor

    def __init__(self, device: torch.device, graphs: Graphs | NoGraphs) -> None:
        self.graphs, self.staging = graphs, Staging(device)
        self.steps: list[Callable[[], None]] = []
        self.num_graphs, self.capturing = 0, False
        self._pending: Pending | None = None
        self._made: Callable[[], None] | None = None  # begins to copy codes out

    def begin(self) -> None:
        self.graphs.begin()
        self.capturing = True

    def cut(self) -> None:
        """Ends a graph. If codes were made in it, they are copied out behind it."""
        if not self.capturing:
            return
        self.steps.append(self.graphs.end())
        self.num_graphs, self.capturing = self.num_graphs + 1, False
        if self._made is not None:
            self.steps.append(self._made)
            self._made = None

    def wait(self) -> None:
        """Codes that were copied out have to be there before others are waited for."""
        self.steps.append(self._wait)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending()
            self._pending = None

    def replay(self) -> None:
        for step in self.steps:
            step()

    # What a codec asks of its staging.

    def download(self, packed: Tensor, out: memoryview) -> Pending:
        def copy() -> None:
            self._pending = self.staging.download(packed, out)

        self._made = copy
        return lambda: None

    def upload(self, pieces: Sequence[Sequence[memoryview]]) -> Tensor:
        """Into memory that graphs read; what follows is captured again."""
        rows = self.staging.upload(pieces)

        def renew() -> None:
            rows.copy_(self.staging.upload(pieces))

        self.steps.append(renew)
        self.begin()
        return rows


class PiecewiseLayer(Layer):
    """A layer that is captured from its first block on, and cut at every exchange."""

    def __init__(self, call: Call, pieces: Pieces) -> None:
        super().__init__(call)
        self.pieces = pieces

    def before_block(self, block: int, hidden: Tensor) -> None:
        if block == 0:
            self.pieces.begin()
        super().before_block(block, hidden)

    def _attend_locally(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        if self.call.sizes.receivers:
            self.pieces.cut()
            self.pieces.begin()
        return super()._attend_locally(block, query, key, value, scale)

    def receive_codes(self, block: int) -> tuple[Any, Tensor | None]:
        self.pieces.cut()
        self.pieces.wait()
        remote = super().receive_codes(block)
        if not self.pieces.capturing:  # there was nothing to receive
            self.pieces.begin()
        return remote

    def finish(self, hidden: Tensor) -> Tensor:
        self.pieces.cut()
        self.pieces.hidden = hidden
        return super().finish(hidden)


def capture(run: Engine, device: torch.device, ids: Tensor) -> Pieces:
    """The pieces of `run(input_ids=ids)`, by a rank whose mesh has everything ready.

    Raises RuntimeError where something in a block cannot be captured.
    """
    graphs = Graphs(device) if device.type == "cuda" else NoGraphs()
    pieces = Pieces(device, graphs)
    eager = Pieces(device, NoGraphs())
    with graphs.running():
        with piecewise(run, eager):  # compiles kernels, which a capture does not allow
            run(input_ids=ids)
        pieces.want = eager.hidden.clone()
        with piecewise(run, pieces):
            try:
                run(input_ids=ids)
            finally:
                pieces.cut()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # replays run in another stream
    return pieces


@contextlib.contextmanager
def piecewise(run: Engine, pieces: Pieces) -> Iterator[None]:
    """Calls of `run` are captured into `pieces`."""
    codec: Any = run.codec
    of_engine: Any = engine
    of_outgoing: Any = outgoing
    kept = of_engine.Layer, of_outgoing.read_later, codec.staging
    of_engine.Layer = lambda call: PiecewiseLayer(call, pieces)
    of_outgoing.read_later = lambda flag: lambda: True
    codec.staging = pieces
    try:
        yield
    finally:
        of_engine.Layer, of_outgoing.read_later, codec.staging = kept
