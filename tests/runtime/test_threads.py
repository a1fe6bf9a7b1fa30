"""Calls of several threads, and calls that are ended by another thread or a clock."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Engine
from astra_runtime.errors import (
    AstraError,
    CallEnded,
)
from astra_runtime.evaluate import run_ranks
from astra_runtime.transport import Mesh

from .models import inputs_for, tiny
from .outputs import answer_of


def test_closing_from_another_thread_ends_the_call_everywhere() -> None:
    inputs = inputs_for("llama", 24)
    models = [tiny("llama") for _ in range(2)]

    def work(mesh: Mesh) -> Any:
        model = models[mesh.rank]
        engine = Engine(model, None, mesh)
        if mesh.rank == 1:

            def close(*_: Any) -> None:
                thread = threading.Thread(target=engine.close)
                thread.start()
                thread.join()

            model.model.layers[0].mlp.register_forward_pre_hook(close)
        start = time.monotonic()
        with pytest.raises(CallEnded, match="rank 1 ended the call: the engine was closed"):
            engine(**inputs)
        assert time.monotonic() - start < 15
        models[1].model.layers[0].mlp._forward_pre_hooks.clear()
        with Engine(model, None, mesh) as again:
            return again(**inputs).logits

    for logits in run_ranks(2, work, timeout=30):
        assert logits.isfinite().all()


def test_threads_take_turns() -> None:
    model = tiny("llama")
    prompts = [inputs_for("llama", length)["input_ids"] for length in (20, 33)]
    with torch.no_grad():
        single = [model(prompt).logits[:, -1:] for prompt in prompts]
    with Engine(model) as engine:
        found: list[tuple[int, Tensor]] = []

        def ask(which: int) -> None:
            found.extend((which, engine(input_ids=prompts[which]).logits) for _ in range(10))

        threads = [threading.Thread(target=ask, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 20
    for which, logits in found:
        torch.testing.assert_close(logits, single[which], rtol=2e-4, atol=2e-4)


def test_threads_in_other_orders_leave_the_mesh_whole() -> None:
    model = tiny("llama")
    prompts = [inputs_for("llama", length)["input_ids"] for length in (20, 33)]

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, None, mesh) as engine:

            def ask(which: int) -> None:
                try:
                    for _ in range(5):
                        engine(input_ids=prompts[which])
                except AstraError:
                    pass

            order = (0, 1) if mesh.rank else (1, 0)
            threads = [threading.Thread(target=ask, args=(which,)) for which in order]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            mesh.agree({"now": "all have asked"})
            return engine(input_ids=prompts[0]).logits

    with torch.no_grad():
        want = model(prompts[0]).logits[:, -1:]
    for logits in run_ranks(2, work, timeout=20):
        torch.testing.assert_close(logits, want, rtol=2e-4, atol=2e-4)


def test_a_call_within_a_call_is_refused() -> None:
    model, ids = tiny("llama"), inputs_for("llama", 12)["input_ids"]
    with Engine(model) as engine:

        def on_token(token: Tensor) -> None:
            with pytest.raises(RuntimeError, match="runs in this thread already"):
                engine(input_ids=ids)

        assert engine.generate(ids, max_new_tokens=2, on_token=on_token).shape == (1, 14)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_cancelling_wakes_whoever_waits(kind: str) -> None:
    """Rank 0 waits for rank 1, which comes when that wait has ended; somebody cancels on rank 0."""
    model, inputs = tiny(kind), inputs_for(kind, 24)
    ended = threading.Event()

    def cancel(engine: Engine) -> None:
        while not ended.wait(0.1):
            engine.cancel()

    def work(mesh: Mesh) -> Any:
        with Engine(model, None, mesh) as engine:
            good = answer_of(engine, inputs)
            cancelling = threading.Thread(target=cancel, args=(engine,))
            if mesh.rank == 0:
                cancelling.start()
            else:
                assert ended.wait(60)
            with pytest.raises(CallEnded, match="rank 0 ended the call: it was cancelled"):
                engine(**inputs)
            if mesh.rank == 0:
                ended.set()
                cancelling.join()
            engine.cancel()  # no call runs
            return good, answer_of(engine, inputs)

    for good, again in run_ranks(2, work, timeout=60):
        assert torch.equal(good, again)


@pytest.mark.parametrize("within", [0, -1.0, float("nan"), 1e10, True, "1"])
def test_a_bound_is_a_number_above_zero(within: Any) -> None:
    with Engine(tiny("llama")) as engine:
        for call in (engine, lambda **given: engine.generate(given.pop("input_ids"), **given)):
            with pytest.raises((TypeError, ValueError), match="within_ms: expected"):
                call(**inputs_for("llama"), within_ms=within)


def test_a_call_takes_no_longer_than_it_may() -> None:
    """Rank 1 comes when rank 0 has given up."""
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    ended = threading.Event()

    def work(mesh: Mesh) -> Any:
        with Engine(model, None, mesh) as engine:
            good = engine(**inputs, within_ms=1e6).logits
            if mesh.rank == 1:
                assert ended.wait(60)
            with pytest.raises(CallEnded, match="rank 0 ended the call: it took longer than 200 m"):
                engine(**inputs, within_ms=200 if mesh.rank == 0 else None)
            ended.set()
            return good, engine(**inputs, within_ms=1e6).logits

    for good, again in run_ranks(2, work, timeout=60):
        assert torch.equal(good, again)


def test_cancelling_ends_generation() -> None:
    """The owner of the text waits for nobody, and hears of it before its next token."""
    model, ids = tiny("llama"), inputs_for("llama", 12)["input_ids"]
    ended = threading.Event()

    def work(mesh: Mesh) -> Any:
        with Engine(model, None, mesh) as engine:
            columns: list[Tensor] = []

            def on_token(token: Tensor) -> None:
                columns.append(token)
                if mesh.rank == 0 and len(columns) == 3:
                    engine.cancel()
                if mesh.rank == 1 and len(columns) == 10:
                    assert ended.wait(60)  # on rank 0, which has said so by then

            with pytest.raises(CallEnded, match="rank 0 ended the call: it was cancelled"):
                engine.generate(ids, max_new_tokens=100, on_token=on_token)
            ended.set()
            return len(columns), engine.generate(ids, max_new_tokens=3)

    with Engine(model) as engine:
        want = engine.generate(ids, max_new_tokens=3)
    (few, _), (most, _) = found = run_ranks(2, work, timeout=60)
    assert 3 <= few <= most <= 10
    assert all(torch.equal(made, want) for _, made in found)
