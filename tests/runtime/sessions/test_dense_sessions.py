"""With dense exchange a session is one device with a dense cache, token by token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from astra_runtime import Engine
from astra_runtime.errors import CallEnded, InvalidChoice, ModelChanged
from astra_runtime.evaluate import run_ranks
from astra_runtime.sessions.decoder import Decoder
from astra_runtime.sessions.session import Session, generate_together
from astra_runtime.transport import Mesh

from ..models import inputs_for, tiny

MODELS = {kind: tiny(kind) for kind in ("llama", "qwen3", "gpt2")}
IDS = {kind: inputs_for(kind, 48)["input_ids"] for kind in MODELS}


@torch.inference_mode()
def greedy(kind: str, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """One device: the continued ids, and the logits behind each of them, [count, V]."""
    rows = []
    for _ in range(count):
        rows.append(MODELS[kind](input_ids=ids).logits[0, -1])
        ids = torch.cat([ids, rows[-1].argmax()[None, None]], 1)
    return ids, torch.stack(rows)


def sessions_of(kind: str, world_size: int, work: Callable[[Session], Any]) -> list[Any]:
    def rank(mesh: Mesh) -> Any:
        with Engine(MODELS[kind], None, mesh) as engine:
            return work(engine.session())

    return run_ranks(world_size, rank, timeout=30)


def close_to(rows: list[Tensor], expected: Tensor) -> None:
    torch.testing.assert_close(torch.stack(rows), expected, rtol=1e-4, atol=1e-4)


class Recorder:
    """Chooses the likeliest token, and keeps the logits that it chose from."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        self.rows.append(logits[0].clone())
        return logits.argmax(-1)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.integers(1, 16), min_size=1, max_size=3),
    world_size=st.sampled_from([1, 2, 3]),
    kind=st.sampled_from(sorted(MODELS)),
    owner=st.integers(0, 2),
    decoding=st.integers(0, 2),
)
def test_a_prompt_split_at_any_place(
    parts: list[int], world_size: int, kind: str, owner: int, decoding: int
) -> None:
    ids = IDS[kind][:, : sum(parts)]
    expected, logits = greedy(kind, ids, 3)

    def work(session: Session) -> tuple[Tensor, list[Tensor]]:
        for number, part in enumerate(ids.split(parts, 1)):
            session.append(part, rank=None if number else owner % world_size)
        seen = Recorder()
        return session.generate(3, choose=seen, rank=decoding % world_size), seen.rows

    results = sessions_of(kind, world_size, work)
    for rank, (got, rows) in enumerate(results):
        assert torch.equal(got, expected)
        if rank == decoding % world_size:
            close_to(rows, logits)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_turns_forks_and_cuts(kind: str) -> None:
    ids = IDS[kind]
    first, _ = greedy(kind, ids[:, :20], 4)
    second, _ = greedy(kind, torch.cat([first, ids[:, 20:27]], 1), 3)
    other, _ = greedy(kind, torch.cat([first[:, :11], ids[:, 30:40]], 1), 3)

    def work(session: Session) -> None:
        session.append(ids[:, :20])
        assert torch.equal(session.generate(4), first)
        fork = session.fork()
        session.append(ids[:, 20:27], rank=0)
        fork.truncate(11)
        fork.append(ids[:, 30:40])
        assert torch.equal(session.generate(3), second)
        again = session.fork()
        assert torch.equal(fork.generate(3), other)
        assert torch.equal(again.ids, second)
        again.truncate(20)
        assert torch.equal(again.generate(4, rank=1), first)
        assert torch.equal(session.generate(1), greedy(kind, second, 1)[0])

    sessions_of(kind, 3, work)


def test_answers_come_from_all_ranks_at_once() -> None:
    ids = IDS["llama"]
    texts = [torch.cat([ids[:, :20], ids[:, 20 + n : 24 + 2 * n]], 1) for n in range(3)]
    expected = [greedy("llama", text, 5)[0] for text in texts]

    def work(session: Session) -> None:
        session.append(ids[:, :20])
        forks = [session.fork() for _ in range(3)]
        steps: list[Tensor] = []
        for n, fork in enumerate(forks):
            fork.append(ids[:, 20 + n : 24 + 2 * n])
        got = generate_together(forks, 5, ranks=[2, 0, 0], on_tokens=steps.append)
        assert all(map(torch.equal, got, expected))
        new = torch.stack([text[0, -5:] for text in expected], 1)
        assert torch.equal(torch.stack(steps), new)

    sessions_of("llama", 3, work)


def test_a_decoder_continues_sessions_that_join_and_leave() -> None:
    ids = IDS["llama"]
    texts = [ids[:, :20], ids[:, 5:14], ids[:, 30:48]]
    expected = [greedy("llama", text, 6)[0] for text in texts]

    def work(mesh: Mesh) -> None:
        with Engine(MODELS["llama"], None, mesh) as engine:
            decoder = engine.decoder()
            sessions = [engine.session() for _ in texts]
            stepped = []

            def step(block: int) -> None:
                stepped.append(decoder.step())

            answers = []
            for session, text in zip(sessions, texts, strict=True):
                session.append(text, rank=1, between=step)
                if mesh.rank == 1:
                    answers.append(decoder.add(session, 6))
            while decoder.step():
                pass
            for session, text in zip(sessions, expected, strict=True):
                assert torch.equal(session.finish(), text)
            # tokens of another decoder are read with what follows them
            sessions[1].append(ids[:, 20:23])
            other = [7, 8] if mesh.rank == 1 else None
            assert sessions[1].finish(other)[0, -2:].tolist() == [7, 8]
            sessions[1].append(ids[:, 23:25], rank=0)
            text = sessions[1].ids
            assert torch.equal(sessions[1].generate(3), greedy("llama", text, 3)[0])
            assert all(answer.done for answer in answers)
            assert any(len(batch) > 1 for batch in stepped) or mesh.rank == 0

    run_ranks(2, work, timeout=30)


@pytest.mark.parametrize("name", ["on_token", "on_tokens"])
def test_a_callback_that_fails_ends_its_call_alone(name: str) -> None:
    ids = IDS["llama"][:, :20]
    expected, _ = greedy("llama", ids, 3)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("of the host's own")

    def work(session: Session) -> Tensor:
        session.append(ids)
        calls: dict[str, Callable[[], Any]] = {
            "on_token": lambda: session.generate(3, on_token=fail),
            "on_tokens": lambda: generate_together([session, session.fork()], 3, on_tokens=fail),
        }
        with pytest.raises(CallEnded, match=f"{name} raised ZeroDivisionError: of the host's own"):
            calls[name]()
        return session.generate(3)

    assert all(torch.equal(got, expected) for got in sessions_of("llama", 2, work))


def test_a_session_goes_on_outside_of_inference_mode() -> None:
    """What it had kept of calls inside could not be written to: that ended the mesh."""
    ids = IDS["llama"]
    first, _ = greedy("llama", ids[:, :20], 3)
    second, _ = greedy("llama", torch.cat([first, ids[:, 20:25]], 1), 3)

    def work(session: Session) -> Tensor:
        with torch.inference_mode():
            session.append(ids[:, :20])
        session.generate(3)
        session.append(ids[:, 20:25])
        with torch.inference_mode():
            return session.generate(3)

    assert all(torch.equal(got, second) for got in sessions_of("llama", 2, work))


@pytest.mark.parametrize("then", ["append", "fork", "generate", "truncate"])
def test_an_answer_that_is_not_finished_is_dropped(then: str) -> None:
    """Its tokens were attended to by what came next, though no rank's session had them."""
    ids = IDS["llama"]
    more = torch.cat([ids[:, :20], ids[:, 30:34]], 1)
    expected, _ = greedy("llama", ids[:, :20] if then == "generate" else more, 3)

    def work(session: Session) -> Tensor:
        session.append(ids[:, :20], rank=0)
        if session._engine.rank == 0:
            decoder = Decoder(session._engine)
            decoder.add(session, 8)
            for _ in range(4):
                decoder.step()
            assert session.keys_and_values()[0][0].shape[2] == 20
        if then == "fork":
            session = session.fork()
        if then == "truncate":
            session.truncate(20)
        if then != "generate":
            session.append(ids[:, 30:34], rank=0)
        return session.generate(3)

    for ranks in (1, 2):
        assert all(torch.equal(got, expected) for got in sessions_of("llama", ranks, work))


def test_a_decoder_refuses_a_model_that_has_changed() -> None:
    model = tiny("llama")
    with Engine(model) as engine:
        session = engine.session()
        session.append(IDS["llama"])
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        with pytest.raises(ModelChanged, match="lm_head"):
            engine.decoder().add(session)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.decoder().add(session)


def test_the_vocabulary_is_that_of_the_embeddings() -> None:
    """Tokens beyond the configuration's number were a wrong frame, and ended the mesh."""
    model, ids = tiny("llama"), IDS["llama"]
    model.model.embed_tokens = nn.Embedding(150, 48)
    model.lm_head = nn.Linear(48, 150, bias=False)
    model.lm_head.weight.data[:97] = 0
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert expected[0, 48:].min() >= 97

    def work(mesh: Mesh) -> None:
        with Engine(model, None, mesh) as engine:
            session = engine.session()
            session.append(ids)
            assert torch.equal(session.generate(3), expected)
            assert torch.equal(engine.generate(ids, max_new_tokens=3), expected)

    run_ranks(2, work, timeout=20)
    model.model.embed_tokens = nn.Embedding(97, 48)

    def beyond(mesh: Mesh) -> None:
        with Engine(model, None, mesh) as engine:
            session = engine.session()
            session.append(ids)
            for call in (lambda: engine.generate(ids), session.generate):
                with pytest.raises(InvalidChoice, match="embeddings of 0 to 96"):
                    call()
            assert engine(input_ids=ids).logits.shape[-1] == 150

    run_ranks(2, beyond, timeout=20)


def test_a_model_that_cannot_be_run_now_is_refused() -> None:
    """Dropout at work would make an answer of chance."""
    model = tiny("gpt2")
    with Engine(model) as engine:
        session = engine.session()
        session.append(IDS["gpt2"][:, :5])
        decoder = engine.decoder()
        calls: list[Callable[[], object]] = [
            lambda: session.append(IDS["gpt2"][:, 5:9]),
            lambda: session.generate(1),
            lambda: decoder.add(session),
        ]
        for call in calls:
            with model_in_training(model), pytest.raises(ValueError, match="evaluation mode"):
                call()
            with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
                call()
        assert session.generate(1).shape == (1, 6)


@contextlib.contextmanager
def model_in_training(model: Any) -> Iterator[None]:
    model.train()
    yield
    model.eval()
