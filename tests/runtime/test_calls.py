"""Calls that are refused, or end early: the mesh stays open, and the next answer is right."""

from __future__ import annotations

import threading
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook, Engine, costs
from astra_runtime.errors import (
    AstraError,
    CallEnded,
    InputsDiffer,
    InvalidChoice,
    NotFinite,
    RequestMismatch,
    WireError,
)
from astra_runtime.evaluate import run_ranks
from astra_runtime.plan import balanced_weights
from astra_runtime.transport import Link, Mesh, local_mesh

from .models import fitted, inputs_for, tiny
from .outputs import answer_of
from .ranks import as_ranks

IDS = {"llama": "input_ids", "gpt2": "input_ids", "bert": "input_ids", "vit": "pixel_values"}


# Requests that are out of step


@pytest.mark.parametrize("requests", [(6, 5), (5, 6), (5, None), (None, 5), (5, 5, 6), (6, 5, 5)])
@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_ranks_out_of_step_find_out_and_go_on(kind: str, requests: tuple[int | None, ...]) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 24)
    book = fitted(kind, model, space="kv", groups=6)

    def work(mesh: Mesh) -> Any:
        with Engine(model, book, mesh) as engine:
            before = answer_of(engine, inputs, request=4)
            with pytest.raises(RequestMismatch) as caught:
                engine(**inputs, request=requests[mesh.rank])
            after = [answer_of(engine, inputs, request=n) for n in (7, 8)]
            return before, after, caught.value

    for before, after, error in run_ranks(len(requests), work, timeout=20):
        assert all(torch.equal(before, again) for again in after)
        assert set(error.requests) == {requests[error.rank], requests[error.other]}
        assert len(set(error.requests)) == 2
        for number in error.requests:
            assert ("no request" if number is None else f"request {number}") in str(error)


def test_prompts_of_other_lengths_and_requests() -> None:
    """Frames of other sizes are left over, of every block, and are dropped."""
    model = tiny("llama")
    prompts = [inputs_for("llama", length)["input_ids"] for length in (60, 12, 33)]

    def work(mesh: Mesh) -> Any:
        rank, found = mesh.rank, []
        with Engine(model, None, mesh, weights=(1, 1, 1)) as engine:
            for turn in range(6):
                with pytest.raises(CallEnded):
                    engine(input_ids=prompts[(rank + turn) % 3], request=rank)
                found.append(engine(input_ids=prompts[turn % 3]).logits)
        return found

    with torch.no_grad():
        single = [model(prompt).logits[:, -1:] for prompt in prompts]
    for found in run_ranks(3, work, timeout=20):
        for turn, logits in enumerate(found):
            torch.testing.assert_close(logits, single[turn % 3], rtol=2e-4, atol=2e-4)


def test_other_prompts_end_the_call_alone() -> None:
    model = tiny("llama")

    def work(mesh: Mesh) -> Any:
        inputs = inputs_for("llama", 24)
        with Engine(model, None, mesh) as engine:
            before = engine(**inputs).logits
            with pytest.raises(WireError, match="runs another plan"):
                engine(**inputs_for("llama", 24 + mesh.rank, seed=mesh.rank))
            return before, engine(**inputs).logits

    for before, after in run_ranks(2, work, timeout=20):
        assert torch.equal(before, after)


ASKED = [
    ({"logits": "last"}, {"logits": "all"}),
    ({"logits": "all"}, {"logits": "last"}),
    ({"logits": "local"}, {"logits": "last"}),
    ({"outputs": "every"}, {"outputs": "one"}),  # the owner of the answer keeps it to itself
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_ranks_that_ask_for_other_answers_find_out_and_go_on(asked: Any) -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    found = threading.Event()

    def work(mesh: Mesh) -> tuple[Tensor, Tensor]:
        look = mesh.check_cancelled

        def look_late() -> None:
            """Rank 0 may need nothing of rank 1, and be done before that has found it out."""
            assert mesh.rank == 1 or found.wait(60)
            look()

        with Engine(model, None, mesh) as engine:
            before = engine(**inputs).logits
            with (
                patch.object(mesh, "check_cancelled", look_late),
                pytest.raises(WireError, match="runs another plan"),
            ):
                engine(**inputs, **asked[mesh.rank])
            found.set()
            return before, engine(**inputs).logits

    for before, after in run_ranks(2, work, timeout=20):
        assert torch.equal(before, after)


@pytest.mark.parametrize("asked", [("every", "every", "one"), ("every", "one", "one")], ids=str)
def test_an_answer_that_never_comes_ends_the_call_alone(asked: tuple[str, ...]) -> None:
    """Of a short input nothing is sent, so that no tag tells that ranks ask for other answers."""
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    book = fitted("llama", model, space="kv", groups=6)

    def work(mesh: Mesh) -> tuple[str, Tensor]:
        told = ""
        with Engine(model, book, mesh, halo=24) as engine:
            try:
                engine(**inputs, outputs=asked[mesh.rank])
            except WireError as error:
                told = str(error)
            return told, engine(**inputs).logits

    with torch.no_grad():
        single = model(**inputs).logits[:, -1:]
    results = run_ranks(3, work, timeout=20)
    assert "every rank has to" in results[0][0]
    for _, logits in results:
        torch.testing.assert_close(logits, single, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("request_", [-1, 2**63, 1.0, True, "7"])
def test_a_request_is_an_integer(request_: Any) -> None:
    with Engine(tiny("llama")) as engine:
        kind = ValueError if type(request_) is int else TypeError
        with pytest.raises(kind, match="request: expected"):
            engine(**inputs_for("llama"), request=request_)
        assert answer_of(engine, inputs_for("llama"), request=2**63 - 1).isfinite().all()


def test_over_an_emulated_link() -> None:
    """Frames wait for the link when the call that they belong to has ended."""
    model, inputs = tiny("bert"), inputs_for("bert", 24)

    def work(mesh: Mesh) -> Any:
        with Engine(model, None, mesh) as engine:
            before = answer_of(engine, inputs, request=1)
            for turn in range(3):
                with pytest.raises(RequestMismatch):
                    engine(**inputs, request=mesh.rank + turn)
            return before, answer_of(engine, inputs, request=1)

    meshes = local_mesh(3, timeout=20, link=Link(mbit_per_s=20.0, delay_ms=1.0))
    for before, after in as_ranks(meshes, work):
        assert torch.equal(before, after)


def test_where_ranks_may_be_left_out() -> None:
    model, inputs = tiny("bert"), inputs_for("bert", 24)
    options: dict[str, Any] = {"on_missing": "degrade", "deadline_ms": 20_000.0}

    def work(mesh: Mesh) -> Any:
        with Engine(model, None, mesh, **options) as engine:
            before = answer_of(engine, inputs)
            for _ in range(2):
                with pytest.raises(RequestMismatch):
                    engine(**inputs, request=mesh.rank)
            return before, answer_of(engine, inputs), engine.degraded

    for before, after, degraded in run_ranks(3, work, timeout=20):
        assert torch.equal(before, after)
        assert not degraded


# What the ranks find during a call


def test_other_pictures_are_refused() -> None:
    model, inputs = tiny("vit"), inputs_for("vit")

    def work(mesh: Mesh) -> Any:
        mine = inputs_for("vit", seed=mesh.rank)
        with Engine(model, None, mesh) as engine:
            before = answer_of(engine, inputs)
            with pytest.raises(InputsDiffer, match="pixel_values: expected the same picture"):
                engine(**mine)
            bright = torch.cat([20 * inputs["pixel_values"], mine["pixel_values"]])
            with pytest.raises(InputsDiffer, match="pixel_values: expected the same picture"):
                engine(pixel_values=bright)
            generator = torch.Generator().manual_seed(mesh.rank)
            noise = torch.empty_like(inputs["pixel_values"]).uniform_(generator=generator)
            rounded = inputs["pixel_values"] + 0.004 * noise  # of each rank's own preprocessing
            return before, answer_of(engine, {"pixel_values": rounded})

    for before, after in run_ranks(3, work, timeout=20):
        torch.testing.assert_close(before, after, rtol=0, atol=0.05)


def test_pictures_of_other_channel_orders_are_refused() -> None:
    """RGB on one host, BGR on the other: every mean over the channels is the same."""
    model, picture = tiny("vit", num_channels=3), torch.randn(1, 3, 20, 20)
    picture += torch.tensor([0.5, 0.0, -0.5])[:, None, None]

    def work(mesh: Mesh) -> None:
        with Engine(model, None, mesh) as engine, pytest.raises(InputsDiffer):
            engine(pixel_values=picture.flip(1) if mesh.rank else picture)

    run_ranks(2, work, timeout=20)


def test_tokens_are_not_drawn_from_what_is_no_number() -> None:
    """Token 0 was the likeliest, on every rank, without a word."""
    model = tiny("llama")
    model.model.norm.weight.data[3] = torch.nan

    def work(mesh: Mesh) -> None:
        with Engine(model, None, mesh) as engine, pytest.raises(CallEnded, match="hold NaN"):
            engine.generate(**inputs_for("llama"), max_new_tokens=2)

    run_ranks(2, work, timeout=20)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("space", ["kv", "hidden", "differential", "none"])
def test_what_is_not_finite_is_never_coded(space: str, value: float) -> None:
    inputs, book = inputs_for("llama", 24), None
    if space != "none":
        book = fitted("llama", tiny("llama"), space=space, groups=6)
    models = [tiny("llama") for _ in range(3)]
    spoiled = threading.Event()
    spoiled.set()

    def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
        return output * value if spoiled.is_set() else output

    models[0].model.layers[0].mlp.register_forward_hook(spoil)

    def work(mesh: Mesh) -> Any:
        with Engine(models[mesh.rank], book, mesh, halo=0) as engine:
            with pytest.raises(NotFinite, match="rank 0 ended the call: .* NaN or infinity"):
                engine(**inputs)
            mesh.agree({"now": "mended"})
            spoiled.clear()
            return engine(**inputs).logits

    for logits in run_ranks(3, work, timeout=20):
        assert logits.isfinite().all()


WRONG_CHOICES = {
    "shape": lambda ids, scores: scores.argmax(-1)[:1].expand(3),
    "floats": lambda ids, scores: scores.argmax(-1).float(),
    "a list": lambda ids, scores: scores.argmax(-1).tolist(),
    "nothing": lambda ids, scores: None,
    "beyond the vocabulary": lambda ids, scores: scores.argmax(-1) + 1000,
    "negative": lambda ids, scores: -scores.argmax(-1) - 1,
}


@pytest.mark.parametrize("name", WRONG_CHOICES)
def test_a_wrong_choice_ends_the_call_alone(name: str) -> None:
    model, ids = tiny("llama"), inputs_for("llama", 12, batch=2)["input_ids"]

    def work(mesh: Mesh) -> Any:
        with Engine(model, None, mesh) as engine:
            with pytest.raises(InvalidChoice, match="choose: expected") as caught:
                engine.generate(ids, max_new_tokens=3, choose=WRONG_CHOICES[name])
            return engine.generate(ids, max_new_tokens=3), str(caught.value)

    with Engine(model) as engine:
        want = engine.generate(ids, max_new_tokens=3)
    for made, words in run_ranks(2, work, timeout=20):
        assert torch.equal(made, want)
        assert words.startswith("rank 1 ended the call: choose: expected")


def test_a_choice_may_write_to_what_it_is_given() -> None:
    model, ids = tiny("llama"), inputs_for("llama", 12)["input_ids"]

    def choose(given: Tensor, scores: Tensor) -> Tensor:
        token = scores.argmax(-1)
        given.zero_()
        scores.zero_()
        return token

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, None, mesh) as engine:
            return engine.generate(
                ids, max_new_tokens=4, choose=choose, on_token=lambda token: token.zero_()
            )

    with Engine(model) as engine:
        want = engine.generate(ids, max_new_tokens=4)
    assert all(torch.equal(made, want) for made in run_ranks(2, work, timeout=20))


def test_finished_rows_keep_the_end_that_they_have() -> None:
    model, ids = tiny("llama"), inputs_for("llama", 12, batch=2)["input_ids"]
    script = [[8, 9], [1, 5], [1, 1], [7, 1]]

    def work(mesh: Mesh) -> Tensor:
        steps = iter(script)
        with Engine(model, None, mesh) as engine:
            return engine.generate(
                ids,
                max_new_tokens=4,
                eos_token_id=[7, 5],
                choose=lambda ids, scores: torch.tensor(next(steps)),
            )

    for made in run_ranks(2, work, timeout=20):
        assert made[:, 12:].tolist() == [[8, 1, 1, 7], [9, 5, 5, 5]]


def test_a_shape_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solving for the shares takes longer than a tiny block."""
    solved: list[int] = []
    solve = balanced_weights

    def counting(tokens: int, *given: Any, **options: Any) -> tuple[float, ...]:
        solved.append(tokens)
        return solve(tokens, *given, **options)

    monkeypatch.setattr(costs, "balanced_weights", counting)
    with Engine(tiny("llama")) as engine:
        for tokens in (24, 24, 24, 30, 24):
            engine(**inputs_for("llama", tokens))
    assert solved == [24, 30]


def test_answers_are_ordinary_tensors() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12)

    def work(mesh: Mesh) -> None:
        with Engine(model, Codebook.none(), mesh) as engine:
            logits = engine(**inputs).logits
            made = engine.generate(inputs["input_ids"], max_new_tokens=2)
        logits[..., 0] = -float("inf")
        made[made == 5] = 0
        assert not logits.requires_grad
        assert not logits.is_inference()
        assert not made.is_inference()

    run_ranks(2, work)


def test_a_transport_that_cannot_resume_ends_the_mesh() -> None:
    """As over datagrams and torch.distributed: the error is the same, and the mesh is closed."""
    model, inputs = tiny("llama"), inputs_for("llama", 24)

    def work(mesh: Mesh) -> str:
        mesh.cancel = mesh.abort  # type: ignore[method-assign]
        with Engine(model, None, mesh) as engine:
            with pytest.raises(RequestMismatch) as caught:
                engine(**inputs, request=mesh.rank)
            with pytest.raises(AstraError, match="closed"):
                engine(**inputs)
        return str(caught.value)

    for words in as_ranks(local_mesh(2), work):
        assert "request 0" in words
        assert "request 1" in words


@pytest.mark.parametrize("name", ["choose", "stop", "on_block", "logits_processor"])
def test_a_function_that_fails_ends_its_call_alone(name: str) -> None:
    """A logits processor that refuses a token of another vocabulary ended everybody's mesh."""
    model, ids = tiny("llama"), inputs_for("llama")["input_ids"]

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("of the host's own")

    given: Any = [fail] if name == "logits_processor" else fail

    def work(mesh: Mesh) -> list[list[int]]:
        with Engine(model, None, mesh) as engine:
            with pytest.raises(CallEnded, match="raised ZeroDivisionError: of the host's own"):
                engine.generate(ids, max_new_tokens=3, **{name: given})
            made: list[list[int]] = engine.generate(ids, max_new_tokens=3).tolist()
            return made

    first, second = run_ranks(2, work, timeout=20)
    assert first == second


@pytest.mark.parametrize("failing", [0, 1])
def test_a_callback_that_fails_ends_its_call_alone(failing: int) -> None:
    model, ids = tiny("llama"), inputs_for("llama")["input_ids"]

    def rank(mesh: Mesh) -> list[str]:
        def on_token(token: Tensor) -> None:
            if mesh.rank == failing and len(heard) == 1:
                raise KeyError("of the host's own")
            heard.append(int(token))

        heard: list[int] = []
        with Engine(model, None, mesh) as engine:
            with pytest.raises(CallEnded, match=f"rank {failing} .*on_token raised KeyError"):
                engine.generate(ids, max_new_tokens=200, on_token=on_token)
            return engine.generate(ids, max_new_tokens=3).tolist()

    first, second = run_ranks(2, rank)
    assert first == second


def test_a_generation_ends_where_its_host_wants() -> None:
    model, ids = tiny("llama"), inputs_for("llama")["input_ids"]
    tokens = ids.shape[1]

    def rank(mesh: Mesh) -> Any:
        blocks: list[int] = []
        with Engine(model, None, mesh) as engine:
            engine.warmup(12, 70)
            out = engine.generate(
                ids,
                max_new_tokens=50,
                stop=lambda whole: whole.shape[1] == tokens + 3,
                on_block=lambda block: (blocks.append(block), model(ids)),  # by itself meanwhile
                within_ms=np.float32(1e6),
            )
            assert engine.seconds > 0
            return out, blocks, engine.generate(ids, max_new_tokens=3)

    for out, blocks, three in run_ranks(2, rank):
        assert torch.equal(out, three)
        assert blocks == [0, 1, 2]
