"""Predictive transform codes: ranks, simulation and formulas agree; the file; what it measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import astra_kernels as ak
from astra_runtime import Codebook, Engine
from astra_runtime.codes.base import GEOMETRY
from astra_runtime.codes.latent import DecoderState, latent_codes
from astra_runtime.codes.layouts import merge_heads, split_heads
from astra_runtime.codes.predictive import Transform, embedding_features, nearest_codewords
from astra_runtime.evaluate import measure, run_ranks
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.train.calibration import as_windows
from astra_runtime.train.simulate import Simulation as Package
from astra_runtime.train.simulate import quantizers
from astra_runtime.transport import Mesh

from ..models import inputs_for, tiny, windows_for
from ..outputs import logits_of, ranks_output, rounding
from ..simulation import Simulation
from ..transforms import fitted, plan_of, simulated

KINDS = ("llama", "qwen3", "gpt2", "bert", "vit")


# The engine.


# An encoder's first tokens see all others, so none is kept exact by every rank.
@pytest.mark.parametrize(
    ("kind", "weights", "prefix"),
    [
        *((kind, (5, 1, 3), prefix) for kind in ("llama", "gpt2") for prefix in (None, 0, 3)),
        *((kind, (5, 1, 3), None) for kind in ("bert", "vit")),
        ("llama", (1, 1), None),
        ("bert", (1, 1), None),
    ],
)
def test_ranks_equal_the_formulas(kind: str, weights: tuple[int, ...], prefix: int | None) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    book = fitted(kind, model, prefix=prefix)
    plan = plan_of(kind, book, 23, weights)
    by_formula = logits_of(Simulation(model, book, plan, inputs).run())
    by_package = simulated(model, book, plan, inputs)
    torch.testing.assert_close(by_package, by_formula, rtol=2e-4, atol=2e-4)
    outputs = ranks_output(model, book, inputs, len(weights), logits="all", weights=weights)
    for output in outputs:
        torch.testing.assert_close(output, by_formula, rtol=2e-4, atol=2e-4)
    dropped = ranks_output(
        model, Codebook.drop(), inputs, len(weights), logits="all", weights=weights
    )[0]
    assert float((dropped - by_formula).abs().max()) > 0.05


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dense_exchange_with_a_prefix_is_exact(kind: str) -> None:
    """What every rank computes itself is what the single device computes."""
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    single, tolerance = rounding(model, inputs)
    book = Codebook("none", prefix=4)
    for output in ranks_output(model, book, inputs, 3, logits="all"):
        assert float((output - single).abs().max()) <= tolerance
    for output in ranks_output(model, book, inputs, 3, logits="last"):
        assert float((output - single[:, -1:]).abs().max()) <= tolerance
    plan = Plan.make(19, 3, causal=True, copies=4)
    found = simulated(model, book, plan, inputs)
    assert float((found - single).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_prefix_reaches_past_padding(kind: str) -> None:
    """The first token that is one, not a column of padding, is what the prefix is for."""
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    inputs["attention_mask"] = torch.ones(2, 23, dtype=torch.int64)
    inputs["attention_mask"][1, :5] = 0
    book = fitted(kind, model)
    plan = Plan.make(23 - 6, 3, causal=True, copies=6, weights=(1, 1, 1))
    wanted = simulated(model, book, plan, inputs)
    output = ranks_output(model, book, inputs, 3, logits="all", weights=(1, 1, 1))[0]
    torch.testing.assert_close(output[0], wanted[0], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(output[1, 5:], wanted[1, 5:], rtol=2e-4, atol=2e-4)


def test_a_prompt_shorter_than_its_prefix_leaves_every_rank_a_token() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 4)
    single, tolerance = rounding(model, inputs)
    for output in ranks_output(model, Codebook("none", prefix=9), inputs, 3, logits="all"):
        assert float((output - single).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_prompt_is_continued_from_its_logits(kind: str) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 23, batch=2)
    book = fitted(kind, model)

    def work(mesh: Mesh) -> tuple[Tensor, Tensor]:
        with Engine(model, book, mesh) as engine:
            first = engine(**inputs).logits[:, -1].argmax(-1)
            return first, engine.generate(inputs["input_ids"], max_new_tokens=4)

    for first, ids in run_ranks(3, work, timeout=30):
        assert ids.shape == (2, 27)
        assert torch.equal(ids[:, 23], first)


def test_bits_are_those_of_the_plan() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 65)
    book = fitted("llama", model)
    assert len({t.codes for t in book.transforms}) > 1  # blocks differ

    def work(mesh: Mesh) -> tuple[float, int]:
        with Engine(model, book, mesh, weights=(1, 1), halo=0) as engine:
            engine(**inputs)
            return engine.bits_per_token_block, mesh.stats.bytes_sent_payload

    (bits, sent), _ = run_ranks(2, work, timeout=30)
    assert book.bits == pytest.approx(bits, rel=0.02)  # 32 tokens: whole bytes
    assert sent >= bits * 32 * 3 / 8


# The file.


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = tiny("llama")
    book = fitted("llama", model)
    book.save_pretrained(tmp_path)
    read = Codebook.from_pretrained(tmp_path)
    assert (read.digest, read.bits, read.prefix) == (book.digest, book.bits, 1)
    inputs = inputs_for("llama", 23)
    outputs = [ranks_output(model, b, inputs, 2)[0] for b in (book, read)]
    assert torch.equal(*outputs)


def test_codebooks_without_a_basis_are_named_as_before() -> None:
    parts = (torch.ones(6, 2), torch.ones(2, 4), torch.zeros(4), torch.ones(4, 2), torch.ones(2, 4))
    code = Transform(*parts, torch.arange(8.0).view(1, 4, 2))
    sizes = dict(zip(GEOMETRY, (2, 1, 1, 2, 3), strict=True))
    book = Codebook("transform", 1, 4, transforms=(code, code), geometry=sizes)
    assert book.digest == "e97c3b4d2d5493e5"
    with_basis = replace(book, basis=torch.eye(3, 2))
    assert with_basis.digest != book.digest
    with_basis.check_fields()
    for basis in (torch.eye(3, 1), torch.eye(2), torch.ones(3)):
        with pytest.raises(ValueError, match="basis: expected"):
            replace(book, basis=basis).check_fields()


# Measuring.


def test_the_prefix_has_a_control_of_its_own() -> None:
    model = tiny("llama")
    windows = as_windows(windows_for("llama", count=2, tokens=40))
    found = measure(model, fitted("llama", model, prefix=5), windows, world_size=2)
    assert found.local_overlap is not None
    assert found.local_overlap != found.local_only
    assert measure(model, Codebook.none("int8"), windows, world_size=2).local_overlap is None


def test_what_every_rank_computes_counts_once() -> None:
    """Exact exchange is exact with a prefix, too, in what is measured of it."""
    model = tiny("llama")
    windows = as_windows(windows_for("llama", count=2, tokens=40))
    for prefix in (1, 4):
        found = measure(model, Codebook("none", prefix=prefix), windows, world_size=2)
        with torch.no_grad():
            start = prefix + (40 - prefix) // 2 + (40 - prefix) % 2
            losses = [
                torch.nn.functional.cross_entropy(
                    model(**w).logits[0, start:-1], w["input_ids"][0, start + 1 :]
                )
                for w in windows
            ]
        wanted = float(torch.stack(losses).mean().exp())
        assert found.astra == pytest.approx(wanted, rel=1e-4)


# The formulas.


def random_transforms(blocks: int, width: int, embedding: int) -> list[Transform]:
    """Random codes; block 0 is exact where there is an embedding, block 3 silent."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / max(1, shape[0]) ** 0.5

    made = []
    for block in range(blocks):
        if block == 0 and embedding:
            made.append(Transform.zero_codes(width, 16))
            continue
        features = 0 if block == 0 else width + embedding
        coordinates = 0 if block == 3 else 12
        made.append(
            Transform(
                normal(features, 8),
                normal(8, width),
                normal(1, width)[0],
                normal(width, coordinates),
                normal(coordinates, width),
                normal(coordinates // 4, 16, 4),
            )
        )
    return made


@pytest.mark.parametrize("embedding", [0, 20])
def test_the_latent_recursion_is_the_formula(embedding: int) -> None:
    """z and ŷ of every block equal those of the module docstring's formulas, in float64."""
    transforms = random_transforms(7, 24, embedding)
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(7, 2, 9, 24, generator=generator)
    ids = torch.randn(2, 9, embedding, generator=generator) if embedding else None
    state = DecoderState(latent_codes(transforms), y[0] if embedding else None, ids, 2, 9)
    known = y[0].double()
    for block, code in enumerate(transforms):
        if block == 0 and embedding:
            torch.testing.assert_close(state.estimate(0, None), y[0])
            state.update(0, None)
            continue
        features = [known, *([ids.double()] if ids is not None else [])] if block else []
        predicted = code.offset.double().expand(2, 9, -1)
        if features:
            predicted = predicted + torch.cat(features, -1) @ code.down.double() @ code.up.double()
        z = (y[block].double() - predicted) @ code.analysis.double()
        codewords = None
        known = predicted
        if code.codes:
            found = state.coordinates(block, y[block])
            torch.testing.assert_close(found.flatten(2).double(), z, rtol=1e-4, atol=1e-4)
            codewords = nearest_codewords(code, y[block] - predicted.float())
            codewords = codewords if block != 5 else torch.zeros_like(codewords)  # lost on the way
            known = predicted + codewords.flatten(2).double() @ code.synthesis.double()
        estimate = state.estimate(block, codewords)
        torch.testing.assert_close(estimate.double(), known, rtol=1e-4, atol=1e-4)
        state.update(block, codewords)


def test_rounding_does_not_grow_over_the_blocks() -> None:
    """Ranks compute in batches of other shapes: what they know differs by rounding alone."""
    transforms = random_transforms(30, 24, 20)
    generator = torch.Generator().manual_seed(3)
    y, ids = (torch.randn(1, 300, n, generator=generator) for n in (24, 64))
    basis = torch.randn(64, 20, generator=generator) / 8
    codes = latent_codes(transforms)

    def state(tokens: slice) -> DecoderState:
        return DecoderState(codes, y[:, tokens], embedding_features(ids[:, tokens], basis))

    whole = state(slice(None))
    parts = [state(slice(i, i + 1)) for i in range(7)]
    for block, code in enumerate(transforms):
        picked = torch.randint(16, (1, 300, code.codes), generator=generator)
        words = ak.decode(picked.int(), code.tables) if code.codes else None
        known = whole.estimate(block, words)
        whole.update(block, words)
        for i, part in enumerate(parts):
            mine = None if words is None else words[:, i : i + 1]
            other = part.estimate(block, mine)
            part.update(block, mine)
            error = (other - known[:, i : i + 1]).norm() / known[:, i : i + 1].norm()
            assert float(error) < 1e-5


def test_blocks_of_zero_codes_are_as_predicted() -> None:
    """A receiver and a sender that skipped a block agree on what follows."""
    model = tiny("llama")
    book = fitted("llama", model)
    empty = Transform.zero_codes(book.transforms[1].offset.numel(), 16)
    kept = book.transforms[1]
    quiet = Transform(
        kept.down, kept.up, kept.offset, empty.analysis, empty.synthesis, empty.tables
    )
    changed = replace(book, transforms=(book.transforms[0], quiet, book.transforms[2]))
    inputs = inputs_for("llama", 23)
    plan = plan_of("llama", changed, 23, (1, 1, 1))
    wanted = simulated(model, changed, plan, inputs)
    for output in ranks_output(model, changed, inputs, 3, logits="all", weights=(1, 1, 1)):
        torch.testing.assert_close(output, wanted, rtol=2e-4, atol=2e-4)


def test_flat_and_heads_are_inverse() -> None:
    key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    back = split_heads(merge_heads(key, value), 3)
    assert torch.equal(torch.stack(back), torch.stack([key, value]))


# Training and losses.


def test_gradients_pass_straight_through_and_reach_the_codebook() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 23)
    book = fitted("llama", model)
    plan = plan_of("llama", book, 23, (1, 1))
    layers = quantizers(book, "cpu", noise=0.3, commitment=0.1).train()
    before = [getattr(layer, "tables", torch.zeros(0)).clone() for layer in layers]
    run = Package(model, book, plan, inputs, layers)
    loss = run.run().logits.logsumexp(-1).sum() + run.commitment
    loss.backward()
    assert float(run.commitment.detach()) > 0
    assert float(adapt(model).blocks[1].self_attn.v_proj.weight.grad.abs().sum()) > 0
    moved = [
        not torch.equal(a, layer.tables)
        for a, layer in zip(before, layers, strict=True)
        if not isinstance(layer, nn.Identity)
    ]
    assert moved == [True, True]


def test_losing_everything_is_dropping_it() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 23)
    book = fitted("llama", model, bits=60)
    assert all(t.codes for t in book.transforms[1:])
    plan = plan_of("llama", book, 23, (1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        none = Package(model, book, plan, inputs, lost=1e-9, generator=generator).run().logits
        plain = Package(model, book, plan, inputs).run().logits
        some = Package(model, book, plan, inputs, lost=0.5, generator=generator).run().logits
    torch.testing.assert_close(none, plain, rtol=1e-4, atol=1e-4)
    assert float((some - plain).abs().max()) > 0.01
