"""The fit of predictive transform codes: what it spends, predicts, and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.codes.latent import DecoderState, latent_codes
from astra_runtime.codes.predictive import Transform, nearest_codewords
from astra_runtime.plan import Plan
from astra_runtime.train.fit_transform import (
    _level,
    _rounded,
    allocate,
    balanced_groups,
    fit_blocks,
    fit_quantizer,
    past_first,
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
from astra_runtime.train.sensitivity import Cost

from ..models import tiny, windows_for
from ..transforms import fitted, simulated


def test_codes_of_the_first_block_alone_go_to_the_second() -> None:
    assert past_first([2, 0, 0]) == [0, 2, 0]
    assert past_first([1]) == [1]
    for counts in ([0, 0, 0], [2, 1, 0], [0, 0, 3]):
        assert past_first(counts) == counts


def test_a_budget_is_kept_and_more_bits_are_nearer() -> None:
    model, inputs = tiny("llama"), {"input_ids": windows_for("llama")}
    plan = Plan.make(39, 2, causal=True, copies=1)
    exact = simulated(model, Codebook.none(), plan, inputs)
    errors = []
    for bits in (3.0, 12.0, 48.0, 200.0):
        book = fitted("llama", model, bits=bits)
        assert 0 < book.bits <= bits
        assert book.notes["bits"] == bits
        assert len(book.notes["codes"]) == 3
        errors.append(float((simulated(model, book, plan, inputs) - exact).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[0]


def test_the_fit_is_deterministic() -> None:
    options = {"space": "transform", "bits": 24, "codewords": 16, "held_back": 0}
    digests = {Codebook.fit(tiny("gpt2"), windows_for("gpt2"), **options).digest for _ in range(2)}
    assert len(digests) == 1


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
        fitted("bert", tiny("bert"), prefix=1)
