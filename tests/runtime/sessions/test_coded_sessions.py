"""Sessions with codes against a reference that rebuilds every token from its codes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.codes.rotary import unrotate
from astra_runtime.evaluate import run_ranks
from astra_runtime.sessions import files
from astra_runtime.sessions.cut import Cut, cut
from astra_runtime.sessions.session import Session
from astra_runtime.transport import Mesh

from ..models import inputs_for, tiny, windows_for
from .reference import Reference

IDS = inputs_for("llama", 64)["input_ids"]
FITS: dict[str, dict[str, Any]] = {
    "kv": {"space": "kv", "groups": 3},
    "shared": {"space": "kv", "groups": 1, "shared": True, "prefix": 2},
    "transform": {"space": "transform", "bits": 40},
}
MODELS = {kind: tiny(kind) for kind in ("llama", "gpt2")}


@functools.cache
def coded(kind: str, name: str) -> tuple[Any, Codebook]:
    model, options = MODELS[kind], FITS[name]
    fitting = {"codewords": 16, "iterations": 3, "held_back": 0} | options
    return model, Codebook.fit(model, windows_for(kind), **fitting)


class Forced:
    """Chooses given tokens, and keeps the logits that it had the choice from."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.rows = iter(tokens), []  # type: ignore[var-annotated]

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        self.rows.append(logits[0].clone())
        return torch.tensor([next(self.tokens)])


TURNS = [  # tokens to append, by whom; tokens generated, by whom
    (23, None, [5, 6, 7], None),
    (9, 0, [8], 1),
    (1, None, [9, 10], None),
    (14, None, [11, 12], 0),
]


@pytest.mark.parametrize(
    ("kind", "name", "world_size"),
    [
        ("llama", "kv", 3),
        ("llama", "shared", 2),
        ("llama", "transform", 3),
        ("gpt2", "transform", 2),
    ],
)
def test_turns_equal_the_reference(kind: str, name: str, world_size: int) -> None:
    model, book = coded(kind, name)

    def work(mesh: Mesh) -> tuple[list[Cut], list[list[Tensor]]]:
        with Engine(model, book, mesh, halo=2) as engine:
            session, start = engine.session(), 0
            cuts, rows = [], []
            for count, owner, tokens, decoder in TURNS:
                owner = session.owner if owner is None else owner
                unread = len(session) - session._state.read
                cuts.append(cut(engine, session._state.read, unread + count, owner))
                session.append(IDS[:, start : start + count], rank=owner)
                start += count
                seen = Forced(tokens)
                session.generate(len(tokens), choose=seen, rank=decoder)
                rows.append(seen.rows)
            return cuts, rows

    results = run_ranks(world_size, work, timeout=30)
    reference, start, unread = Reference(model, book, world_size), 0, IDS[:, :0]
    for turn, (count, _, tokens, decoder) in enumerate(TURNS):
        shares = results[0][0][turn]
        owner = shares.members[-1]
        new = torch.cat([unread, IDS[:, start : start + count]], 1)
        start += count
        expected = [reference.append(new, shares)]
        place = owner if decoder is None else decoder
        if place != owner:
            expected = [reference.again(place)]
        for token in tokens[:-1]:
            expected.append(reference.read(place, torch.tensor([[token]])))
        unread = torch.tensor([tokens[-1:]])
        got = results[place][1][turn]
        torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["kv", "transform"])
def test_the_first_turn_is_the_engines(name: str) -> None:
    model, book = coded("llama", name)

    def work(mesh: Mesh) -> None:
        with Engine(model, book, mesh) as engine:
            alone, seen = Forced([1, 2, 3]), Forced([1, 2, 3])
            engine.generate(IDS[:, :40], max_new_tokens=3, choose=alone)
            session = engine.session()
            session.append(IDS[:, :40])
            session.generate(3, choose=seen)
            if mesh.rank == 2:
                torch.testing.assert_close(
                    torch.stack(seen.rows), torch.stack(alone.rows), rtol=1e-4, atol=1e-4
                )

    run_ranks(3, work, timeout=30)


@pytest.mark.parametrize("name", ["shared", "transform"])
def test_saved_and_freed_sessions_equal_the_reference(name: str, tmp_path: Path) -> None:
    model, book = coded("llama", name)
    file, steps = tmp_path / "session", [IDS[:, 30 + n : 33 + n] for n in range(4)]
    monkey = pytest.MonkeyPatch()
    monkey.setattr(files, "TAIL", 5)

    def work(mesh: Mesh) -> tuple[list[Cut], list[Tensor]]:
        cuts, rows = [], []

        def ask(session: Session, new: Tensor) -> None:
            state, seen = session._state, Forced([0])
            unread = session.ids[:, state.read :]
            cuts.append(cut(engine, state.read, unread.shape[1] + new.shape[1], session.owner))
            session.append(new)
            session.fork().generate(1, choose=seen)
            rows.append(seen.rows[0] if seen.rows else torch.empty(0))

        with Engine(model, book, mesh, halo=2) as engine:
            session = engine.session()
            cuts.append(cut(engine, 0, 30, 0))
            session.append(IDS[:, :30], rank=0)
            session.generate(3, choose=Forced([1, 2, 3]))
            session.save(file)
            session = engine.load_session(file)
            assert session.ids.shape[1] == 33
            ask(session, steps[0])
            session.release("exact")
            ask(session, steps[1])
            session.release("codes")
            ask(session, steps[2])
            session.save(file)
        return cuts, rows

    try:
        results = run_ranks(2, work, timeout=30)
    finally:
        monkey.undo()
    cuts, rows = results[0][0], results[1][1]
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["session"]
    reference, sinks = Reference(model, book, 2), book.prefix
    reference.append(IDS[:, :30], cuts[0])
    for token in (1, 2):
        reference.read(0, torch.tensor([[token]]))
    reference.forget(sinks, 32 - 5)
    expected = [reference.append(torch.cat([torch.tensor([[3]]), steps[0]], 1), cuts[1])]
    expected.append(reference.append(steps[1], cuts[2]))
    reference.forget(sinks, len(reference.ids[0]))
    expected.append(reference.append(steps[2], cuts[3]))
    torch.testing.assert_close(torch.stack(rows), torch.stack(expected), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("most", "count"), [(2, 2), (64, 4)])  # of 14 tokens a quarter
def test_the_last_tokens_have_fine_codes_on_every_rank(most: int, count: int) -> None:
    model = MODELS["llama"]
    fitting = {"bits": 40, "codewords": 16, "rank": 8, "iterations": 3, "held_back": 0}
    book = Codebook.fit(
        model,
        windows_for("llama"),
        space="transform",
        fine_bits=60,
        fine_tokens=most,
        **fitting,
    )
    known: dict[int, Any] = {}

    def work(mesh: Mesh) -> None:
        with Engine(model, book, mesh) as engine:
            session = engine.session()
            session.append(IDS[:, :30], rank=0)
            session.generate(2, choose=Forced([3, 4]), rank=1)
            assert session.answered is not None
            # rank 1 has read the last of these tokens itself
            assert (session.answered.rank, session.answered.fine_tokens) == (1, count)
            state = session._state
            known[mesh.rank] = [state.cache.tensors(block, 20, 29) for block in range(3)]
            session.truncate(27)
            session.generate(1, choose=Forced([3]), rank=1)
            assert session.answered.fine_tokens == 0

    run_ranks(2, work, timeout=30)
    reference = Reference(model, book, 2)
    reference.ids = IDS[:, :30]
    places = list(range(20, 29))
    exact, coarse, first = known[0], reference.coded(known[0], places), 10 - count
    rope = reference.adapter.rope(torch.tensor([places]))
    for block, fine in enumerate(book.fine):
        ys = [
            torch.cat([unrotate(key, rope), value], 1).transpose(1, 2).flatten(2)
            for key, value in (exact[block], coarse[block], known[1][block])
        ]
        wanted = ys[1] + fine.decode(fine.encode(ys[0] - ys[1])) if block else ys[1]
        # the last of 30 tokens; the very last was read anew
        torch.testing.assert_close(ys[2][:, first:], wanted[:, first:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ys[2][:, :first], ys[1][:, :first], rtol=1e-3, atol=1e-3)
        if block and fine.codes:
            assert (ys[2] - ys[0])[:, first:].norm() < 0.9 * (ys[1] - ys[0])[:, first:].norm()


def test_fine_codes_are_read_again_beside_a_token_that_is_exact() -> None:
    """What was freed is rebuilt as it was, also where this rank has read the last token itself."""
    fitting = {"bits": 40, "codewords": 16, "rank": 8, "iterations": 3, "held_back": 0}
    model = MODELS["llama"]
    book = Codebook.fit(model, windows_for("llama"), space="transform", fine_bits=60, **fitting)

    def work(mesh: Mesh) -> None:
        with Engine(model, book, mesh) as engine:
            session = engine.session()
            session.append(IDS[:, :30], rank=0)
            session.generate(1, choose=Forced([3]), rank=1)
            kept = session.fork()
            session.release("exact")
            for each in (kept, session):
                each.generate(1, choose=Forced([4]), rank=1)
            states = [kept._state, session._state]
            assert states[0].fine is not None
            assert states[0].fine.stop - states[0].fine.start > 1
            for block in range(3):
                pairs = [state.cache.tensors(block, 0, 30) for state in states]
                if mesh.rank == 1:
                    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-4)

    run_ranks(2, work, timeout=30)
