"""Differential codes over depth: sender and receivers stay in step, in every call anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import astra_kernels as ak
from astra_runtime import Codebook, Engine
from astra_runtime.codes.base import geometry
from astra_runtime.codes.differential import DifferentialCodes
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.transport import Mesh

from ..models import book_of, inputs_for, tiny, windows_for
from ..outputs import logits_of, ranks_output, rounding

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert")


def fitted(kind: str, model: Any, **options: Any) -> Codebook:
    options = {"groups": 4, "codewords": 32, "iterations": 3, "held_back": 0} | options
    return book_of(model, kind, space="differential", **options)


@pytest.mark.parametrize(
    ("kind", "groups", "world_size"),
    [
        *((kind, groups, 3) for kind in KINDS for groups in (1, 4)),
        *((kind, 4, ranks) for kind in ("llama", "bert") for ranks in (2, 4)),
    ],
)
def test_a_codeword_for_every_vector_is_exact(kind: str, groups: int, world_size: int) -> None:
    """Any step that one side took and the other did not would be far more than rounding."""
    model, inputs = tiny(kind), inputs_for(kind, 23)
    vectors = adapt(model).count(inputs)[1]
    book = Codebook.fit(
        model,
        inputs["input_ids"],
        space="differential",
        groups=groups,
        codewords=vectors,
        held_back=0,
    )
    single, tolerance = rounding(model, inputs)
    dropped = ranks_output(model, Codebook.drop(), inputs, world_size, logits="all")[0]
    assert float((dropped - single).abs().max()) > 0.1
    for output in ranks_output(model, book, inputs, world_size, logits="all", weights=None):
        assert float((output - single).abs().max()) <= tolerance


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[DifferentialCodes]]:
    """The state of every pass that ranks begin, by rank."""
    begun: dict[int, list[DifferentialCodes]] = {}
    begin = DifferentialCodes.begin

    def spy(self: DifferentialCodes, inputs: Any, plan: Plan, rank: int) -> DifferentialCodes:
        this = begin(self, inputs, plan, rank)
        begun.setdefault(rank, []).append(this)
        return this

    monkeypatch.setattr(DifferentialCodes, "begin", spy)
    return begun


@pytest.mark.parametrize("weights", [(1, 1), (5, 1, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_both_sides_have_the_same_estimates(
    kind: str, weights: tuple[int, ...], passes: dict[int, list[DifferentialCodes]]
) -> None:
    """Bit for bit, after the last block and so after each."""
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    ranks_output(model, fitted(kind, model), inputs, len(weights), weights=weights)
    encoder = kind == "bert"
    tokens = adapt(model).count(inputs)[1]
    plan = Plan.make(tokens, len(weights), causal=not encoder, weights=weights)
    known = adapt(model).embed(inputs)[:, int(encoder) :]
    for rank in range(len(weights)):
        sources = plan.sources(rank)
        sent = [passes[n][0].own for n in sources]
        remote = passes[rank][0].remote
        assert remote.shape == (2, sum(plan.size(n) for n in sources), 48)
        if sources:
            assert torch.equal(remote, torch.cat(sent, 1))
            assert not torch.equal(remote, torch.cat([known[:, plan.shard(n)] for n in sources], 1))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_first_blocks_input(kind: str) -> None:
    """With positions and token types, padded or not."""
    model, inputs = tiny(kind), inputs_for(kind, 12, batch=2)
    mask = torch.ones_like(inputs["input_ids"])
    if kind == "bert":
        mask[1, 8:] = 0
        inputs["token_type_ids"] = torch.tensor([[0, 1] * 6, [1, 0] * 6])
    else:
        mask[1, :5] = 0
    inputs["attention_mask"] = mask
    adapter = adapt(model)

    class Heard:
        first: Tensor

        def embedded(self, hidden: Tensor) -> Tensor:
            return hidden

        def before_block(self, block: int, hidden: Tensor) -> None:
            if block == 0:
                self.first = hidden

        def attend(self, block: int, *rest: Any) -> None:
            return None

        def finish(self, hidden: Tensor) -> Tensor:
            return hidden

    heard = Heard()
    positions = {} if kind == "bert" else {"position_ids": adapter.positions(inputs)}
    with torch.inference_mode(), adapter.listening(heard):
        model(**inputs, **positions)
    assert torch.equal(adapter.embed(inputs), heard.first)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_every_call_starts_anew(kind: str) -> None:
    """Other lengths and batches between, generation too, and nothing is left of them."""
    model = tiny(kind)
    book = fitted(kind, model)
    shapes = [(23, 1), (9, 3), (40, 2), (23, 1)]

    def work(mesh: Mesh) -> list[Tensor]:
        found = []
        with Engine(model, book, mesh) as engine:
            for tokens, batch in shapes:
                inputs = inputs_for(kind, tokens, batch)
                found.append(logits_of(engine(**inputs, logits="all")))
                if kind != "bert":
                    engine.generate(inputs["input_ids"], max_new_tokens=3)
            assert not hasattr(engine.codec, "own")
        return found

    outputs = run_ranks(3, work)[0]
    assert torch.equal(outputs[0], outputs[3])
    alone = ranks_output(model, book, inputs_for(kind, 40, 2), 3, logits="all", halo=None)[0]
    assert torch.equal(outputs[2], alone)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_batch_equals_single_calls(kind: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 19, batch=2)
    book = fitted(kind, model)
    both = ranks_output(model, book, inputs, 3, logits="all", weights=(2, 1, 4))[0]
    for row in range(2):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        single = ranks_output(model, book, one, 3, logits="all", weights=(2, 1, 4))[0]
        torch.testing.assert_close(both[row : row + 1], single, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_shards_of_one_token(kind: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 5 if kind == "bert" else 4)
    book = fitted(kind, model)
    outputs = ranks_output(model, book, inputs, 4, logits="all")
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert outputs[0].isfinite().all()


def test_nothing_crosses_for_a_model_of_one_block() -> None:
    """Its remote tokens are known by their ids: exact for nothing."""
    model, inputs = tiny("llama", num_hidden_layers=1), inputs_for("llama", 20)
    book = fitted("llama", model)
    assert book.bits == 0
    single, tolerance = rounding(model, inputs)

    def work(mesh: Mesh) -> Tensor:
        with Engine(model, book, mesh) as engine:
            before = mesh.stats
            output = engine(**inputs, logits="local").logits
            assert (mesh.stats - before).bytes_sent_total == 0
            assert engine.bits_per_token_block == 0
        return output

    whole = torch.cat(run_ranks(2, work), 1)
    assert float((whole - single).abs().max()) <= tolerance


def test_the_loop_is_closed_in_the_fit() -> None:
    """A block's codewords are means of what the blocks before it missed."""
    model, windows = tiny("llama"), windows_for("llama")
    book = fitted("llama", model, iterations=20)
    assert book.tables is not None
    assert not book.tables[0].any()
    inputs: dict[int, Tensor] = {}

    class Inputs:
        def embedded(self, hidden: Tensor) -> Tensor:
            return hidden

        def before_block(self, block: int, hidden: Tensor) -> None:
            inputs[block] = hidden.flatten(0, 1)

        def attend(self, block: int, *rest: Any) -> None:
            return None

        def finish(self, hidden: Tensor) -> Tensor:
            return hidden

    with torch.inference_mode(), adapt(model).listening(Inputs()):
        model(input_ids=windows)
    estimate, errors = inputs[0], []
    for block in (1, 2):
        missing = (inputs[block] - estimate).unflatten(-1, (4, -1))
        step = ak.decode(ak.encode(missing, book.tables[block]), book.tables[block])
        for rows, vectors in zip(step.unbind(1), missing.unbind(1), strict=True):
            _, members = rows.unique(dim=0, return_inverse=True)
            means = torch.stack([vectors[members == m].mean(0) for m in range(members.max() + 1)])
            assert float((means[members] - rows).norm()) < 0.1 * float(rows.norm())
        errors.append(float((missing - step).square().sum() / missing.square().sum()))
        estimate = estimate + step.flatten(1)
    assert max(errors) < 0.7


def test_fit_is_deterministic_on_any_number_of_threads() -> None:
    model, before = tiny("llama"), torch.get_num_threads()
    digests = set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            digests.add(fitted("llama", model).digest)
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


def test_fit_reports_and_evaluates_like_the_others(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    model = tiny("llama")
    book = fitted(
        "llama", model, held_back=1, world_size=2, progress=lambda *step: seen.append(step)
    )
    assert list(dict.fromkeys(step[0] for step in seen)) == [
        "calibrating",
        "clustering",
        "evaluating",
    ]
    assert [step for step in seen if step[0] == "clustering"] == [
        ("clustering", done, 3) for done in range(4)
    ]
    assert book.notes["held_back"]["metric"] == "perplexity"
    assert book.bits == pytest.approx(4 * 5 * 2 / 3)
    book.save_pretrained(tmp_path)
    again = Codebook.from_pretrained(tmp_path)
    assert again.digest == book.digest
    assert again.bits == book.bits
    Engine(model, again).close()


def test_models_without_token_ids_are_refused() -> None:
    model = tiny("vit")
    message = "differential codes need token ids.*type 'vit' has none: use 'kv' or 'hidden'"
    with pytest.raises(ValueError, match=message):
        Codebook.fit(model, windows_for("vit"), space="differential", codewords=8)
    adapter = adapt(model)
    hidden = Codebook.fit(model, windows_for("vit"), space="hidden", codewords=8, held_back=0)
    book = dataclasses.replace(hidden, space="differential")
    assert (book.model, book.geometry) == (adapter.digest(), geometry(adapter))
    with pytest.raises(ValueError, match=message):
        Engine(model, book)
