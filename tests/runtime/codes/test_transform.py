"""Predictive transform codes: the engine, the fit, and what the formulas promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import astra_kernels as ak
from astra_runtime import Codebook, Engine
from astra_runtime.codes.base import GEOMETRY
from astra_runtime.codes.latent import DecoderState, latent_codes
from astra_runtime.codes.layouts import merge_heads, split_heads
from astra_runtime.codes.predictive import Transform, embedding_features, nearest_codewords
from astra_runtime.codes.rotary import rotate
from astra_runtime.evaluate import measure, run_ranks
from astra_runtime.models import adapt
from astra_runtime.plan import Plan
from astra_runtime.train.calibration import as_windows
from astra_runtime.train.fit_transform import (
    _level,
    _rounded,
    allocate,
    balanced_groups,
    fit_blocks,
    fit_quantizer,
    predictor,
)
from astra_runtime.train.linear import (
    Centred,
    LinearModel,
    Products,
    Rows,
    linear_models,
    regression,
    shared_basis,
)
from astra_runtime.train.sensitivity import Cost, _shortened, sensitivity
from astra_runtime.train.simulate import Simulation as Package
from astra_runtime.train.simulate import quantizers
from astra_runtime.transport import Mesh

from ..models import book_of, inputs_for, tiny, windows_for
from ..simulation import Simulation
from ..test_engine import logits_of, ranks_output, rounding

KINDS = ("llama", "gpt2", "bert", "vit")


def fitted(model: Any, kind: str, **options: Any) -> Codebook:
    options = {"bits": 24, "codewords": 16, "rank": 8, "iterations": 3, "held_back": 0} | options
    return book_of(model, kind, space="transform", **options)


def plan_of(kind: str, book: Codebook, tokens: int, weights: tuple[int, ...]) -> Plan:
    copies = book.prefix if kind in ("llama", "gpt2") else 1
    body = 25 if kind == "vit" else tokens - copies
    causal = kind in ("llama", "gpt2")
    return Plan.make(body, len(weights), causal=causal, copies=copies, weights=weights)


@torch.no_grad()
def simulated(model: Any, book: Codebook, plan: Plan, inputs: dict[str, Tensor]) -> Tensor:
    return logits_of(Package(model, book, plan, inputs).run())


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
    book = fitted(model, kind, prefix=prefix)
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
    book = fitted(model, kind)
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
    book = fitted(model, kind)

    def work(mesh: Mesh) -> tuple[Tensor, Tensor]:
        with Engine(model, book, mesh) as engine:
            first = engine(**inputs).logits[:, -1].argmax(-1)
            return first, engine.generate(inputs["input_ids"], max_new_tokens=4)

    for first, ids in run_ranks(3, work, timeout=30):
        assert ids.shape == (2, 27)
        assert torch.equal(ids[:, 23], first)


def test_bits_are_those_of_the_plan() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 65)
    book = fitted(model, "llama")
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
    book = fitted(model, "llama")
    book.save_pretrained(tmp_path)
    read = Codebook.from_pretrained(tmp_path)
    assert (read.digest, read.bits, read.prefix) == (book.digest, book.bits, 1)
    inputs = inputs_for("llama", 23)
    outputs = [ranks_output(model, b, inputs, 2)[0] for b in (book, read)]
    assert torch.equal(*outputs)


# The fit.


def test_a_budget_is_kept_and_more_bits_are_nearer() -> None:
    model, inputs = tiny("llama"), {"input_ids": windows_for("llama")}
    plan = Plan.make(39, 2, causal=True, copies=1)
    exact = simulated(model, Codebook.none(), plan, inputs)
    errors = []
    for bits in (3.0, 12.0, 48.0, 200.0):
        book = fitted(model, "llama", bits=bits)
        assert 0 < book.bits <= bits
        assert book.notes["bits"] == bits
        assert len(book.notes["codes"]) == 3
        errors.append(float((simulated(model, book, plan, inputs) - exact).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[0]


def test_the_prefix_has_a_control_of_its_own() -> None:
    model = tiny("llama")
    windows = as_windows(windows_for("llama", count=2, tokens=40))
    found = measure(model, fitted(model, "llama", prefix=5), windows, world_size=2)
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


def test_the_fit_is_deterministic() -> None:
    options = {"space": "transform", "bits": 24, "codewords": 16, "held_back": 0}
    digests = {Codebook.fit(tiny("gpt2"), windows_for("gpt2"), **options).digest for _ in range(2)}
    assert len(digests) == 1


def test_sensitivity_is_what_an_error_costs() -> None:
    """½·δᵀFδ against the divergence that errors really cause, block by block."""
    model = tiny("llama")
    windows = as_windows(windows_for("llama", count=24, tokens=40))
    cost = sensitivity(model, windows, prefix=1, world_size=2, seed=0)
    plan = Plan.make(39, 2, causal=True, copies=1)
    for block in range(3):
        told = real = 0.0
        for number, inputs in enumerate(windows[:8]):
            generator = torch.Generator().manual_seed(number)
            width = cost.shape[-1]
            delta = 0.03 * torch.randn(1, 39, width, generator=generator)
            delta[:, plan.bounds[1] :] = 0

            class Off(Package):
                def _remote_pairs(self, at: int, key: Tensor, value: Tensor, *given: Any) -> Any:
                    ((far, far_value),) = super()._remote_pairs(at, key, value, *given)
                    if at == block:  # noqa: B023
                        rows = split_heads(delta, key.shape[1])  # noqa: B023
                        far, far_value = far + rotate(rows[0], self.rope), far_value + rows[1]
                    return [(far, far_value)]

            with torch.inference_mode():
                exact = Package(model, Codebook.none(), plan, inputs).run().logits.log_softmax(-1)
                off = Off(model, Codebook.none(), plan, inputs).run().logits.log_softmax(-1)
            real += float((exact.exp() * (exact - off)).sum())
            told += 0.5 * float(torch.einsum("btu,uv,btv->", delta, cost[block], delta))
        assert told == pytest.approx(real, rel=0.35), block


def test_few_long_gradients_do_not_drown_the_others() -> None:
    rows = torch.randn(101, 6, generator=torch.Generator().manual_seed(0))
    rows = rows / rows.norm(dim=1, keepdim=True) * torch.linspace(1, 2, 101)[:, None]
    rows[7] *= 1000
    rows[8] = 0
    found = _shortened(rows)
    torch.testing.assert_close(found[7], rows[7] / rows[7].norm() * 4.5, rtol=0.02, atol=0)
    others = torch.arange(101) != 7
    assert torch.equal(found[others], rows[others])
    assert torch.equal(_shortened(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_weights_ask_for_gradients_as_before() -> None:
    model = tiny("gpt2")
    first, *others = model.parameters()
    first.requires_grad_(False)
    cost = sensitivity(model, as_windows(windows_for("gpt2")[:1]), prefix=1, world_size=2, seed=0)
    assert bool((cost.diagonal(dim1=1, dim2=2) > 0).all())
    assert not first.requires_grad
    assert all(weight.requires_grad for weight in others)
    assert all(weight.grad is None for weight in model.parameters())


def test_roots_squared_are_the_costs() -> None:
    half = torch.randn(2, 6, 6)
    cost = half @ half.transpose(1, 2)
    found = Cost.of(cost)
    torch.testing.assert_close(found.root, found.root.transpose(1, 2))
    torch.testing.assert_close(found.root @ found.root, cost, rtol=0.05, atol=0.05)
    torch.testing.assert_close(found.root @ found.inverse, torch.eye(6).repeat(2, 1, 1))
    raised = Cost.of(cost, 0.5).root
    more = 0.5 * cost.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(6)
    torch.testing.assert_close(raised @ raised, cost + more, rtol=1e-4, atol=1e-4)
    shrunk = Cost.of(cost, 0.0, 2.0).root
    own = torch.diag_embed(cost.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(shrunk @ shrunk, cost + 2 * own, rtol=1e-4, atol=1e-4)


FLAT = Cost.of(torch.eye(4).repeat(2, 1, 1))  # all errors cost the same


def rows_of(generator: torch.Generator, spreads: list[Tensor], count: int = 4000) -> Rows:
    made = [torch.randn(count, len(s), generator=generator) * s for s in spreads]
    return Rows(made, None)


def models_of(rows: Rows) -> list[LinearModel]:
    return list(linear_models(Products.of(rows)))


def test_bits_go_where_they_buy_most() -> None:
    """Independent blocks: the water level of the textbook, ½·log₂(λ/level) bits an axis."""
    generator = torch.Generator().manual_seed(0)
    spreads = [torch.tensor([8.0, 4.0, 0.1, 0.1]), torch.tensor([64.0, 64.0, 64.0, 0.01])]
    rows = models_of(rows_of(generator, spreads))
    counts = allocate(rows, FLAT, 10.0, 2)
    assert sum(counts) * 2 <= 20
    assert counts == [2, 8]  # 20 bits over axes of 3, 2, 6, 6 and 6 bits above 1: 0.6 less each
    weighed = Cost.of(
        torch.stack([64 * torch.eye(4), torch.eye(4)])
    )  # errors in block 0 cost 64 times more
    assert allocate(rows, weighed, 10.0, 2)[0] > counts[0]
    assert allocate(rows, weighed, 0.9, 2) == [0, 0]


def test_a_budget_is_nearly_spent_in_a_few_steps() -> None:
    """Also where most of what is to be coded are errors of the blocks before."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(2000, 12, generator=generator)]
    for scale in (0.01, 0.02, 0.04, 0.07, 0.11):
        blocks.append(blocks[-1] + scale * torch.randn(2000, 12, generator=generator))
    models, cost = models_of(Rows(blocks, None)), Cost.of(torch.eye(12).repeat(6, 1, 1))
    for bits in (2.0, 20.0, 200.0):
        steps: list[int] = []
        codes = sum(allocate(models, cost, bits, 2, progress=steps.append))
        assert 0.97 * bits * 6 - 2 <= codes * 2 <= bits * 6
        assert len(steps) <= 10


def test_what_can_be_predicted_needs_no_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4000, 4, generator=generator)
    mixed = first @ torch.randn(4, 4, generator=generator) + 0.01 * torch.randn(
        4000, 4, generator=generator
    )
    rows = models_of(Rows([first, mixed], torch.randn(4000, 3, generator=generator)))
    assert allocate(rows, FLAT, 100.0, 4)[0] == 0  # known to everyone
    free = models_of(Rows([first, mixed], None))
    counts = allocate(free, FLAT, 12.0, 4)
    assert counts[0] > counts[1]  # the second follows from the first


def test_what_rounding_leaves_goes_where_it_took_most() -> None:
    assert _rounded([2.4, 1.2, 0.3, 3.0], 8) == [3, 1, 1, 3]
    assert _rounded([2.4, 1.2, 0.0, 3.0], 20) == [3, 2, 0, 4]  # nothing is to be gained by a 0
    assert _rounded([2.4, 1.2], 3) == [2, 1]


def test_features_side_by_side_are_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, y = (torch.randn(50, n, generator=generator) + 2 for n in (3, 4, 2))
    parts, whole = Centred.of(a).beside(Centred.of(b)), Centred.of(torch.cat([a, b], 1))
    weights = torch.randn(7, 2, generator=generator)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.cross(y), whole.cross(y), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.product(weights), whole.product(weights))


def test_a_shared_basis_has_what_all_blocks_read() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    embedding = normal(2000, 10) @ normal(10, 10) + 3
    read = embedding @ normal(10, 3)  # of ten numbers three sums
    blocks = [normal(2000, 4)]
    for _ in range(2):
        blocks.append(0.5 * blocks[-1] + read @ normal(3, 4) + 0.1 * normal(2000, 4))
    rows, cost = Rows(blocks, embedding), Cost.of(torch.eye(4).repeat(3, 1, 1))
    models = models_of(rows)
    for count, lost in ((3, False), (2, True)):
        basis = shared_basis(rows, models, cost.root, count)
        assert basis.shape == (10, count)
        few = models_of(rows.in_basis(basis))
        for one, other in zip(models, few, strict=True):
            ratio = float(other.noise.trace() / one.noise.trace())
            assert ratio > 2 if lost else ratio < 1.2


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


def test_the_level_spends_the_budget() -> None:
    values = torch.tensor([100.0, 30.0, 2.0, 0.5, 0.01])
    for budget in (1.0, 4.0, 30.0):
        bits = _level(values, budget)
        assert float(bits.sum()) == pytest.approx(budget, rel=1e-5)
        assert bool((bits > 0).all())


def test_axes_are_grouped_evenly() -> None:
    groups = balanced_groups(torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0]), 2)
    assert groups == [[0, 3, 4], [1, 2]]  # 6, 5; then 4 to the 5, 3 to the 6, 2 to a 9


def test_a_predictor_of_full_rank_is_the_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(500, n, generator=generator) for n in (7, 5))
    y = y + x[:, :5] + 3
    half = torch.randn(5, 5, generator=generator)
    cost = Cost.of((half @ half.T)[None])
    root, inverse = cost.root[0], cost.inverse[0]
    squeeze, spread, offset = predictor(Centred.of(x), y, root, inverse, 5)
    centred = x - x.mean(0)
    full = regression(centred.T @ centred, centred.T @ (y - y.mean(0)), len(x))
    torch.testing.assert_close(squeeze @ spread, full, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(offset + x.mean(0) @ full, y.mean(0), rtol=1e-3, atol=1e-3)
    worse = predictor(Centred.of(x), y, root, inverse, 1)
    assert worse[0].shape == (7, 1)

    def error(parts: tuple[Tensor, Tensor, Tensor]) -> float:
        left = y - parts[2] - x @ parts[0] @ parts[1]
        return float((left @ root).square().sum())

    assert error((squeeze, spread, offset)) < error(worse)


def test_coordinates_and_back_are_the_coded_axes() -> None:
    generator = torch.Generator().manual_seed(0)
    missing = torch.randn(400, 6, generator=generator) * torch.tensor([9.0, 5, 3, 1, 1, 1])
    half = torch.randn(6, 6, generator=generator)
    cost = Cost.of((half @ half.T)[None])
    root, inverse = cost.root[0], cost.inverse[0]
    analysis, synthesis, tables = fit_quantizer(missing, root, inverse, 6, 256, 2, 0)
    code = Transform(
        torch.zeros(0, 1), torch.zeros(1, 6), torch.zeros(6), analysis, synthesis, tables
    )
    back = code.synthesize(code.coordinates(missing))
    torch.testing.assert_close(back, missing, rtol=1e-3, atol=1e-3)  # all axes are coded


def test_the_loop_is_closed() -> None:
    """What one block's codes miss, the next block's prediction sees."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3000, 4, generator=generator) * torch.tensor([4.0, 2.0, 1.0, 0.5])
    rows = Rows([y, y.clone(), y.clone()], None)
    cost = Cost.of(torch.eye(4).repeat(3, 1, 1))
    options: dict[str, Any] = {"codewords": 16, "rank": 4, "iterations": 4, "seed": 0}
    made, left = fit_blocks(rows, cost, [1, 1, 1], kept=1000, **options)
    known = DecoderState(latent_codes(made), None, None, 1, len(y))
    errors = []
    for block, code in enumerate(made):
        codewords = nearest_codewords(code, y[None] - known.estimate(block, None))
        found = known.estimate(block, codewords)
        known.update(block, codewords)
        errors.append(float((found - y).square().mean()))
        kept = left[block]
        assert kept is not None
        near = (kept - (y - found[0])[::3]).abs().amax(1) < 1e-3
        assert near.float().mean() > 0.99  # the others: two codewords as near, but for rounding
    assert fit_blocks(rows, cost, [1, 0, 1], **options)[1] == [None] * 3
    for kept, errors_kept in ((2001, 2001), (5000, 3000)):
        error = fit_blocks(rows, cost, [0, 0, 1], kept=kept, **options)[1][2]
        assert error is not None
        assert len(error) == errors_kept
    assert errors[2] < 0.5 * errors[1] < 0.25 * errors[0]  # four bits more each time


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
    book = fitted(model, "llama")
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
    book = fitted(model, "llama")
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
    book = fitted(model, "llama", bits=60)
    assert all(t.codes for t in book.transforms[1:])
    plan = plan_of("llama", book, 23, (1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        none = Package(model, book, plan, inputs, lost=1e-9, generator=generator).run().logits
        plain = Package(model, book, plan, inputs).run().logits
        some = Package(model, book, plan, inputs, lost=0.5, generator=generator).run().logits
    torch.testing.assert_close(none, plain, rtol=1e-4, atol=1e-4)
    assert float((some - plain).abs().max()) > 0.01


# Refusals.


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"bits": 0.5}, "bits: expected at least"),
        ({"bits": 1e6}, "bits: expected at least"),
        ({"rank": 0}, "rank: expected at least 1"),
        ({"prefix": -1}, "prefix: expected 0 or more"),
        ({"basis": 49}, "basis: expected 0 to 48"),
        ({"codewords": 4096}, "codewords: expected"),
        (
            {"space": "kv", "groups": 3, "bits": 30},
            "bits, target_gap, fine_bits: expected with space",
        ),
    ],
)
def test_bad_options_are_refused_before_any_work(options: dict[str, Any], wanted: str) -> None:
    given = {"space": "transform", "codewords": 16, "held_back": 0} | options
    with pytest.raises(ValueError, match=wanted):
        Codebook.fit(tiny("llama"), windows_for("llama"), **given)


def test_an_encoder_has_no_prefix() -> None:
    with pytest.raises(ValueError, match="prefix: expected 0 or more, and 0 for an encoder"):
        fitted(tiny("bert"), "bert", prefix=1)
