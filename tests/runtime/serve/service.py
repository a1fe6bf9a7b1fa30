"""A leader and its workers, as threads of one process, for the tests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.serve.leader import Leader
from astra_runtime.serve.rank import follow
from astra_runtime.serve.rounds import Rounds
from astra_runtime.serve.service import Done, Event, GenerationRequest, Sampling, Token
from astra_runtime.transport import local_mesh

GREEDY = Sampling(temperature=0)
R = TypeVar("R", bound=Rounds)


class Numbers:
    """A tokenizer whose texts are the ids themselves."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"{id} " for id in ids)


@contextlib.contextmanager
def leading(
    model: Any, world_size: int, make: Callable[[Engine], R], codebook: Codebook | None = None
) -> Iterator[R]:
    """What `make` makes of rank 0's engine, ready; the ranks are threads and share `model`."""
    meshes = local_mesh(world_size, timeout=20)

    def work(mesh: Any) -> None:
        with mesh, Engine(model, codebook, mesh) as engine:
            follow(engine)

    workers = [threading.Thread(target=work, args=(mesh,), daemon=True) for mesh in meshes[1:]]
    for worker in workers:
        worker.start()
    with meshes[0], Engine(model, codebook, meshes[0]) as engine:
        with make(engine) as leader:
            assert leader.wait_ready(60)
            yield leader
        for worker in workers:
            worker.join(60)
            assert not worker.is_alive()


@contextlib.contextmanager
def led(
    model: Any, world_size: int, codebook: Codebook | None = None, **options: Any
) -> Iterator[Leader]:
    """A leader that is ready, over `world_size` ranks."""

    def make(engine: Engine) -> Leader:
        return Leader(engine, Numbers(), **options)

    with leading(model, world_size, make, codebook) as leader:
        yield leader


def prompt(tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (tokens,), generator=generator).tolist()


def alone(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    """What one device continues a prompt with, token after token without any cache."""
    whole = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(new_tokens):
            token: Tensor = model(whole, use_cache=False).logits[:, -1].argmax(-1)
            whole = torch.cat([whole, token[:, None]], 1)
    return whole[0, len(ids) :].tolist()


class Heard:
    """Gathers the events of one request; waits for its end. `held`: the leader comes no further
    than its first event before `resume` is set."""

    def __init__(self, held: bool = False) -> None:
        self.events: list[Any] = []
        self.first, self.over, self.resume = (threading.Event() for _ in range(3))
        self.ticket: Any = None
        if not held:
            self.resume.set()

    def __call__(self, event: Event | Exception | None) -> None:
        if event is None:
            self.over.set()
            return
        self.events.append(event)
        self.first.set()
        self.resume.wait(60)

    def wait(self) -> Heard:
        assert self.over.wait(60)
        return self

    def ids(self, index: int = 0) -> list[int]:
        return [e.id for e in self.events if isinstance(e, Token) and e.index == index]

    def done(self, index: int = 0) -> Done:
        return next(e for e in self.events if isinstance(e, Done) and e.index == index)

    def error(self) -> Exception | None:
        return next((e for e in self.events if isinstance(e, Exception)), None)


def ask(
    leader: Leader, ids: list[int], new_tokens: int = 5, *, held: bool = False, **asked: Any
) -> Heard:
    heard = Heard(held)
    asked = {"sampling": GREEDY} | asked
    name = f"request-{id(heard)}"
    heard.ticket = leader.submit(GenerationRequest(name, ids, new_tokens, **asked), heard)
    return heard
