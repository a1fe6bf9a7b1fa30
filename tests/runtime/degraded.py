"""Ranks that are late, and the simulation of what they should answer: with the same frames lost."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.control import is_control
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.train.simulate import Simulation
from astra_runtime.transport import Mesh

from .models import fitted, inputs_for, tiny
from .outputs import logits_of
from .ranks import MAKERS, as_ranks

DEADLINE = 300.0  # milliseconds
Late = Mapping[tuple[int, int], Sequence[int]]  # (sender, block) -> receivers
SPACES = {
    "kv": {"space": "kv", "groups": 6},
    "hidden-1": {"space": "hidden", "groups": 1},
    "hidden-4": {"space": "hidden", "groups": 4},
    "differential": {"space": "differential", "groups": 4},
    # a seed with which no vector lies between two codewords: rounding would choose
    "transform": {"space": "transform", "bits": 60, "seed": 1},
    "dense": None,
}


class Clock:
    """Which rank has done with the frames of which block, in the order of its calls, and how many
    it has sent."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.past: set[tuple[int, int]] = set()
        self.sent: Counter[tuple[int, int]] = Counter()

    def count(self, rank: int, block: int) -> None:
        with self.changed:
            self.sent[rank, block] += 1
            self.changed.notify_all()

    def wait_for(self, rank: int, block: int, count: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.sent[rank, block] >= count, 60)

    def mark(self, rank: int, block: int) -> None:
        with self.changed:
            self.past.add((rank, block))
            self.changed.notify_all()

    def wait(self, ranks: Sequence[int], block: int) -> None:
        with self.changed:
            assert self.changed.wait_for(
                lambda: all((rank, block) in self.past for rank in ranks), 60
            )


@Mesh.register
class SlowMesh:
    """A rank that reaches some receivers only when they have given up waiting for that block; once,
    and from then on in time.

    Deadlines run once everybody else has sent, so that a busy machine makes nobody late.
    """

    def __init__(self, mesh: Mesh, late: Late, clock: Clock) -> None:
        self.mesh, self.late, self.clock = mesh, late, clock
        self.calls: Counter[tuple[int, int]] = Counter()  # of receive, by sender and block
        self.reached: set[tuple[int, int]] = set()  # receivers of this rank's blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mesh, name)

    def send(self, payload: Any, *, block: int, to: Sequence[int], **place: Any) -> None:
        late = [n for n in self.late.get((self.mesh.rank, block), ()) if n in to]
        late = [n for n in late if (block, n) not in self.reached]
        self.reached.update((block, n) for n in to)
        self.mesh.send(payload, block=block, to=[n for n in to if n not in late], **place)
        self.clock.count(self.mesh.rank, block)
        if late:
            self.clock.wait(late, block)
            self.mesh.send(payload, block=block, to=late, **place)

    def receive(self, sizes: Any, *, block: int, **place: Any) -> Any:
        for sender in sizes if place.get("partial") or not is_control(block) else ():
            self.calls[sender, block] += 1
            late = self.mesh.rank in self.late.get((sender, block), ())
            if self.calls[sender, block] > 1 or not late:
                self.clock.wait_for(sender, block, self.calls[sender, block])
        try:
            return self.mesh.receive(sizes, block=block, **place)
        finally:
            if sizes:
                self.clock.mark(self.mesh.rank, block)


def degraded_ranks(
    model: Any,
    book: Codebook | None,
    world_size: int,
    late: Late,
    work: Callable[[Engine], Any],
    *,
    weights: Sequence[float],
    maker: str = "tcp",
    **options: Any,
) -> list[Any]:
    """What `work` gives on every rank whose engine leaves out who is late."""
    clock = Clock()

    def run(mesh: Mesh) -> Any:
        slow: Any = SlowMesh(mesh, late, clock)
        deadline = DEADLINE if late else 60_000.0  # where nobody is late, it ends no wait
        given: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": deadline, "halo": 0}
        given |= options
        with Engine(model, book, slow, weights=weights, **given) as engine:
            return work(engine)

    return as_ranks(MAKERS[maker](world_size), run)


def simulated(
    model: Any, book: Codebook, inputs: dict[str, Tensor], late: Late, **given: Any
) -> Tensor:
    adapter = adapt(model)
    copies = max(book.prefix, adapter.class_tokens)
    tokens = adapter.count(inputs)[1] - book.prefix
    weights = given.pop("weights")
    plan = Plan.make(tokens, len(weights), causal=adapter.causal, copies=copies, weights=weights)
    missed = [(to, sender, block) for (sender, block), found in late.items() for to in found]
    with torch.no_grad():
        run = Simulation(model, book, plan, inputs, missed=missed, **given)
        return logits_of(run.run())


def book_for(kind: str, name: str, model: Any) -> Codebook:
    options = SPACES[name]
    return Codebook.none() if options is None else fitted(kind, model, **options)


@functools.cache
def clear_inputs(name: str, weights: tuple[int, ...]) -> dict[str, Tensor]:
    """Inputs of which no vector lies at the border of two codewords, where rounding decides: the
    ranks and the simulation code them alike while nothing is late."""
    model = tiny("llama")
    book = book_for("llama", name, model)
    for seed in range(1, 9):
        inputs = inputs_for("llama", 23, batch=2, seed=seed)
        whole = simulated(model, book, inputs, {}, weights=weights)[:, -1]

        def work(mesh: Mesh, inputs: dict[str, Tensor] = inputs) -> Tensor:
            with Engine(model, book, mesh, weights=weights) as engine:
                return engine(**inputs).logits[:, -1]

        if torch.allclose(as_ranks(MAKERS["tcp"](3), work)[0], whole, rtol=2e-4, atol=2e-4):
            return inputs
    raise AssertionError("the ranks never agree with the simulation")
