"""`num_return_sequences` on several ranks: the prompt is read once, and each rank draws a part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.errors import CallEnded, InvalidChoice, WireError
from astra_runtime.evaluate import run_ranks
from astra_runtime.sessions import several
from astra_runtime.sessions.answers import decode_together
from astra_runtime.sessions.codes import synchronize
from astra_runtime.sessions.session import generate_together

from ..models import inputs_for, tiny, windows_for

SAMPLED = {"do_sample": True, "top_k": 20, "repetition_penalty": 1.2, "max_new_tokens": 6}
COUNT = 4


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each call and rank, who draws which answer."""
    seen: list[list[int]] = []
    real = decode_together

    def decode(engine: Any, works: Any, ranks: list[int], *rest: Any) -> Any:
        seen.append(ranks)
        return real(engine, works, ranks, *rest)

    monkeypatch.setattr(several, "decode_together", decode)
    return seen


def one_device(model: Any, ids: Tensor, **keywords: Any) -> tuple[Tensor, float]:
    """What one device draws after seed 5, and what comes next from its generator."""
    torch.manual_seed(5)
    with Engine(model) as engine:
        drawn = engine.generate(ids, num_return_sequences=COUNT, **SAMPLED | keywords)
    return drawn, float(torch.rand(1))


def on_ranks(
    model: Any,
    ids: Tensor,
    world_size: int,
    book: Codebook | None = None,
    heard: list[list[Tensor]] | None = None,
    **keywords: Any,
) -> tuple[list[Tensor], float]:
    """The same of several ranks; the owner's generator has the seed. `heard`: columns, by rank."""

    def work(mesh: Any) -> Tensor:
        options = SAMPLED | keywords
        if heard is not None:
            options["on_token"] = heard[mesh.rank].append
        with Engine(model, book, mesh) as engine:
            if mesh.rank == world_size - 1:
                torch.manual_seed(5)
            drawn = engine.generate(ids, num_return_sequences=COUNT, **options)
            assert engine.seconds > 0
            return drawn

    drawn = run_ranks(world_size, work)
    return drawn, float(torch.rand(1))


@pytest.mark.parametrize("tokens", [1, 9, 90])
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_draw_what_one_device_draws(
    llama: Any, places: list[list[int]], tokens: int, world_size: int
) -> None:
    ids = inputs_for("llama", tokens)["input_ids"]
    wanted, rest = one_device(llama, ids)
    drawn, after = on_ranks(llama, ids, world_size)
    assert all(torch.equal(each, wanted) for each in drawn)
    assert after == rest  # the generator is as far as one device's
    assert len({tuple(row) for row in wanted.tolist()}) == COUNT
    assert {tuple(ranks) for ranks in places} == {
        tuple((world_size - 1 + n) % world_size for n in range(COUNT))
    }


def test_answers_end_each_by_itself(llama: Any) -> None:
    ids = inputs_for("llama", 90)["input_ids"]
    end = int(one_device(llama, ids)[0][1, 92])  # the third new token of the second answer
    options = {"eos_token_id": end}
    wanted = one_device(llama, ids, **options)[0]
    assert (wanted[1, 92:] == end).all()  # goes on with its end token until all have ended
    heard: list[list[Tensor]] = [[], []]
    drawn, _ = on_ranks(llama, ids, 2, heard=heard, **options)
    assert all(torch.equal(each, wanted) for each in drawn)
    for columns in heard:
        assert torch.equal(torch.stack(columns, 1), wanted[:, 90:])


def test_with_codes_all_ranks_return_the_same(llama: Any, places: list[list[int]]) -> None:
    book = Codebook.fit(llama, windows_for("llama"), groups=3, codewords=16, held_back=0)
    ids = inputs_for("llama", 90)["input_ids"]
    first, second = (on_ranks(llama, ids, 2, book)[0] for _ in range(2))
    assert all(torch.equal(each, first[0]) for each in [*first, *second])
    short = inputs_for("llama", 9)["input_ids"]  # every rank reads it: exact
    assert torch.equal(on_ranks(llama, short, 2, book)[0][0], one_device(llama, short)[0])
    assert {frozenset(ranks) for ranks in places} == {frozenset((0, 1))}


def test_the_owner_draws_all_where_too_much_would_cross(
    llama: Any, places: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "MOST_SHARED", 1000)
    ids = inputs_for("llama", 90)["input_ids"]
    drawn, _ = on_ranks(llama, ids, 2)
    assert torch.equal(drawn[0], one_device(llama, ids)[0])
    assert places == [[1] * COUNT] * 2


@pytest.mark.parametrize(
    "keywords",
    [
        {"attention_mask": torch.tensor([[0, 0, *[1] * 7]])},
        {"stop": lambda ids: False},
        {"on_block": lambda block: None},
    ],
)
def test_what_one_rank_alone_can_do_is_done_by_the_owner(
    llama: Any, places: list[list[int]], keywords: dict[str, Any]
) -> None:
    ids = inputs_for("llama", 9)["input_ids"]
    drawn, _ = on_ranks(llama, ids, 2, **keywords)
    assert torch.equal(drawn[0], one_device(llama, ids, **keywords)[0])
    assert places == []


def test_errors_end_the_call_and_no_more(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = inputs_for("llama", 9)["input_ids"]

    def hear(column: Tensor) -> None:
        raise RuntimeError("of the host's own")

    def work(mesh: Any) -> Tensor:
        options: dict[str, Any] = SAMPLED | {"num_return_sequences": 2}
        with Engine(llama, None, mesh) as engine:
            with pytest.raises(ValueError, match="max_new_tokens: expected at most"):
                engine.generate(ids, **options | {"max_new_tokens": 300})
            with pytest.raises(CallEnded, match="on_token raised RuntimeError"):
                engine.generate(ids, on_token=hear, **options)
            with pytest.raises(ValueError, match="within_ms"):
                engine.generate(ids, within_ms=-1, **options)
            with pytest.raises(InvalidChoice, match="not finite"):
                engine.generate(ids, **options | {"temperature": 1e-45})
            same = engine.generate(ids, **options)
            with pytest.raises(WireError, match="another plan"):  # each would draw its own way
                engine.generate(ids, **options | {"temperature": 1.0 + mesh.rank})
            return same

    first, second = run_ranks(2, work)
    assert torch.equal(first, second)


def test_forks_of_one_prefix_hear_its_codes_once(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Codebook.fit(llama, windows_for("llama"), groups=3, codewords=16, held_back=0)
    document = inputs_for("llama", 90)["input_ids"]
    ranks = [2, 0, 1, 0]
    calls: list[int] = []

    def counted(engine: Any, *rest: Any) -> None:
        calls.append(engine.rank)
        synchronize(engine, *rest)

    monkeypatch.setattr("astra_runtime.sessions.answers.synchronize", counted)

    def work(mesh: Any) -> list[Tensor]:
        with Engine(llama, book, mesh) as engine:
            session = engine.session()
            session.append(document)
            alone = [session.fork().generate(5, rank=rank) for rank in ranks]
            if mesh.rank == 0:
                calls.clear()
            forks = [session.fork() for _ in ranks]
            together = generate_together(forks, 5, ranks=ranks)
            assert all(map(torch.equal, together, alone))
            again = [fork.generate(3) for fork in forks]  # they go on, each by itself
            assert all(text.shape[1] == 98 for text in again)
            return together

    first, second, third = run_ranks(3, work)
    for other in (second, third):
        assert all(map(torch.equal, first, other))
    assert calls.count(0) == 1
