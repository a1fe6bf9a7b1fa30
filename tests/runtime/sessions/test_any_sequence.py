"""Any sequence of calls: exact with dense exchange, and with codes all ranks know the same."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.sessions.session import Session
from astra_runtime.transport import Mesh

from ..models import inputs_for, tiny, windows_for

MODEL = tiny("llama")
IDS = inputs_for("llama", 256)["input_ids"]
RANKS = 3


@functools.cache
def book(name: str) -> Codebook | None:
    if name == "none":
        return None
    options: dict[str, Any] = {"codewords": 16, "iterations": 2, "held_back": 0, "prefix": 2}
    transform = {"space": "transform", "bits": 40}
    options |= {
        "kv": {"space": "kv", "groups": 3},
        "transform": transform,
        "fine": transform | {"fine_bits": 60},
    }[name]
    return Codebook.fit(MODEL, windows_for("llama"), **options)


@functools.cache
def greedy(ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    for _ in range(count):
        logits = MODEL(input_ids=torch.tensor([ids])).logits[0, -1]
        ids = (*ids, int(logits.argmax()))
    return ids


ranks = st.sampled_from([None, *range(RANKS)])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 20), ranks),
        st.tuples(st.just("generate"), st.integers(1, 3), ranks),
        st.tuples(st.just("truncate"), st.integers(0, 20), st.none()),
        st.tuples(st.just("fork"), st.integers(0, 20), st.none()),
        st.tuples(st.sampled_from(["exact", "codes"]), st.just(0), st.none()),
    ),
    min_size=3,
    max_size=9,
)


def walk(session: Session, todo: list[Any], exact: bool) -> list[Any]:
    """What every rank has to see alike after each step."""
    seen: list[Any] = []
    for number, (what, count, rank) in enumerate(todo):
        length = len(session)
        if what == "append":
            session.append(IDS[:, 20 * number : 20 * number + count], rank=rank)
        elif what == "generate" and length:
            before = tuple(session.ids[0].tolist())
            after = session.generate(count, rank=rank)[0].tolist()
            with torch.inference_mode():
                assert not exact or tuple(after) == greedy(before, count)
        elif what == "truncate":
            session.truncate(max(0, length - count))
        elif what == "fork":  # two sessions go on, and the one that forked is left
            other = session.fork()
            session.append(IDS[:, 200 : 201 + count], rank=rank)
            session = other
        elif what in ("exact", "codes"):
            session.release(what)
        state = session._state
        stores = [store.packed() for store in state.store or ()]
        known = state.exact, state.pending, stores, state.fine
        seen.append((session.ids, state.read, state.owner, *known))
    return seen


@pytest.mark.parametrize("name", ["none", "kv", "transform", "fine"])
@pytest.mark.parametrize("examples", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_ranks_agree_after_any_sequence_of_calls(name: str, examples: int) -> None:
    codebook = book(name)

    @settings(max_examples=examples, deadline=None, derandomize=examples < 10)
    @given(todo=steps)
    def check(todo: list[Any]) -> None:
        def work(mesh: Mesh) -> list[Any]:
            with Engine(MODEL, codebook, mesh) as engine:
                return walk(engine.session(), todo, exact=name == "none")

        first, *others = run_ranks(RANKS, work, timeout=30)
        for other in others:
            for (ids, *facts), (same_ids, *same) in zip(first, other, strict=True):
                assert torch.equal(ids, same_ids)
                assert facts == same

    check()


def rebuilt(session: Session) -> list[tuple[Tensor, Tensor]]:
    engine, state = session._engine, session._state
    return [state.cache.tensors(block) for block in range(len(engine.adapter.blocks))]


@pytest.mark.parametrize("name", ["kv", "transform"])
def test_what_is_freed_is_rebuilt_as_it_was(name: str) -> None:
    def work(mesh: Mesh) -> None:
        with Engine(MODEL, book(name), mesh) as engine:
            session = engine.session()
            session.append(IDS[:, :40], rank=0)
            session.generate(3, rank=1)
            session.append(IDS[:, 50:70], rank=2)
            session.generate(2, rank=0)
            session.generate(1, rank=mesh.rank if mesh.world_size == 1 else 2)
            copy = session.fork()
            copy.release("exact")
            copy.generate(1, rank=2)
            session.generate(1, rank=2)
            # who has not answered is ready to, but where memory was to be freed
            ready = [one._state.cache.length == one._state.read for one in (session, copy)]
            assert ready == [True, mesh.rank == 2]
            if mesh.rank == 2:
                for ours, theirs in zip(rebuilt(session), rebuilt(copy), strict=True):
                    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)

    run_ranks(RANKS, work, timeout=30)
