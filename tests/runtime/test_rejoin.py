"""After a failure the ranks connect again and go on, with what they have loaded."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from astra_runtime import Engine
from astra_runtime.cli import main
from astra_runtime.errors import AstraError, ConnectFailed, HandshakeRefused, PeerLost
from astra_runtime.transport import Mesh, connect, local_mesh
from tests.processes import Fork

from .cli.commands import PROMPT, model_options
from .models import fitted, inputs_for, tiny
from .ranks import as_ranks, free_ports, key_folder, together
from .transport.test_abort import cut


@pytest.mark.parametrize("encrypted", [False, True])
def test_the_same_answer_after_a_rank_was_replaced(encrypted: bool) -> None:
    """Rank 1 dies in its second call, and another one takes its place."""
    model, inputs = tiny("bert"), inputs_for("bert", 23)
    book = fitted("bert", model, space="kv", groups=6)
    peers = free_ports(3)
    keys = key_folder() if encrypted else None
    answered = threading.Barrier(3, timeout=60)  # what is cut off before is lost on its way

    def joined(rank: int) -> Mesh:
        return connect(rank, 3, peers, keys=keys, timeout=60, connect_timeout=60)

    def survivor(rank: int) -> Any:
        engine = Engine(model, book, joined(rank))
        hooks, first = engine.adapter, engine(**inputs).last_hidden_state
        answered.wait()
        with pytest.raises(PeerLost, match="rank 1"):
            engine(**inputs)
        with pytest.raises(AstraError, match="closed"):
            engine(**inputs)
        engine.rejoin()
        assert engine.adapter is hooks
        again = engine(**inputs).last_hidden_state
        engine.close()
        engine.mesh.close()
        return first, again

    def short_lived() -> Any:
        mesh = joined(1)
        engine = Engine(model, book, mesh)
        first = engine(**inputs).last_hidden_state
        answered.wait()
        cut(mesh)
        mesh.close()
        with joined(1) as fresh, Engine(model, book, fresh) as engine:
            return first, engine(**inputs).last_hidden_state

    calls = [lambda: survivor(0), short_lived, lambda: survivor(2)]
    found = together(calls, errors_too=True)
    assert not [error for error in found if isinstance(error, BaseException)]
    for first, again in found:
        assert torch.equal(first, again)


def test_a_rank_that_was_left_out_comes_back() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 23)
    peers = free_ports(3)
    options: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": 60_000.0}
    answered = threading.Barrier(3, timeout=60)

    def survivor(rank: int) -> Any:
        engine = Engine(model, None, connect(rank, 3, peers, connect_timeout=60), **options)
        outputs = [engine(**inputs)]
        answered.wait()
        outputs.append(engine(**inputs))
        engine.rejoin()
        outputs.append(engine(**inputs))
        engine.mesh.close()
        engine.close()
        return [(output.missing, output.logits) for output in outputs]

    def short_lived() -> Any:
        mesh = connect(0, 3, peers, connect_timeout=60)
        Engine(model, None, mesh, **options)(**inputs)
        answered.wait()
        cut(mesh)
        mesh.close()
        with connect(0, 3, peers, connect_timeout=60) as fresh:
            Engine(model, None, fresh, **options)(**inputs)

    _, *found = together([short_lived, lambda: survivor(1), lambda: survivor(2)])
    for (before, first), (without, second), (after, third) in found:
        assert (before, without, after) == ({}, {0: [0, 1, 2]}, {})
        assert not torch.equal(first, second)
        assert torch.equal(first, third)


def test_facts_are_compared_again() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12)
    fresh = local_mesh(2)

    def work(mesh: Mesh) -> None:
        with Engine(model, None, mesh) as engine:
            engine(**inputs)
            engine.deadline_ms = 100.0 * (1 + mesh.rank)
            with pytest.raises(HandshakeRefused, match="deadline_ms"):
                engine.rejoin(fresh[mesh.rank])

    as_ranks(local_mesh(2), work)


def test_what_cannot_be_rejoined_says_why() -> None:
    model = tiny("llama")
    with local_mesh(1)[0] as mesh:
        engine = Engine(model, None, mesh)
        with pytest.raises(AstraError, match="reconnect: expected a mesh made by `connect`"):
            engine.rejoin()
        pair = local_mesh(2)
        with pytest.raises(ValueError, match="mesh: expected rank 0 of 1, got rank 0 of 2"):
            engine.rejoin(pair[0])
        engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            engine.rejoin()
        for other in pair:
            other.close()


def test_a_worker_serves_run_after_run(
    home: Path,
    here: Callable[..., tuple[str, str]],
) -> None:
    """Two runs join one worker; it is killed, and the next run joins its successor."""
    place = [*model_options(home), "--peers", ",".join(free_ports(2))]

    def worker() -> Fork:
        return Fork(lambda: main(["worker", "--rank", "1", *place]))

    def answer() -> str:
        asked = ["--prompt", PROMPT, "--max-new-tokens", "5", "--json"]
        out, _ = here("run", "--rank", "0", *place, *asked)
        return str(json.loads(out)["text"])

    first = worker()
    try:
        texts = [answer(), answer()]
        assert first.poll() is None
        first.kill()
        first.wait(60)
        second = worker()
        try:
            texts.append(answer())
            second.terminate()
            assert second.wait(60) == 143
        finally:
            second.kill()
            second.stdout.close()
    finally:
        first.kill()
        first.stdout.close()
    assert len(set(texts)) == 1
    assert len(texts[0].split()) == 5


@pytest.mark.parametrize("way", ["close", "cancel"])
@pytest.mark.parametrize("waits_for", ["the rank", "its engine"])
def test_a_rejoin_that_is_given_up_ends_at_once(way: str, waits_for: str) -> None:
    """It waited on for its `connect_timeout`, and joined for an engine that was closed."""
    model, peers, made = tiny("llama"), free_ports(2), threading.Barrier(2, timeout=60)
    left, connected, over = (threading.Event() for _ in range(3))
    engines: list[Engine] = []

    def leader() -> str:
        engines.append(Engine(model, None, connect(0, 2, peers, timeout=60)))
        made.wait()
        left.wait(60)
        with pytest.raises(ConnectFailed) as ended:
            engines[0].rejoin(connect_timeout=40)
        over.set()
        engines[0].mesh.close()
        return str(ended.value)

    def other() -> None:
        with connect(1, 2, peers, timeout=60) as mesh, Engine(model, None, mesh):
            made.wait()
        left.set()
        if waits_for == "its engine":
            with contextlib.suppress(AstraError), connect(1, 2, peers, timeout=60):
                connected.set()  # and makes no engine
                over.wait(60)

    def host() -> float:
        (left if waits_for == "the rank" else connected).wait(60)
        time.sleep(0.2)
        began = time.monotonic()
        getattr(engines[0], way)()
        over.wait(60)
        return time.monotonic() - began

    said, _, seconds = together([leader, other, host])
    reasons = {"close": "rejoin: the engine was closed", "cancel": "rejoin: it was cancelled"}
    assert said == reasons[way]
    assert seconds < 5
