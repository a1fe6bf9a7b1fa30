"""NAVQ against its formulas, written down a second time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime.train.navq import NAVQ


def data(
    seed: int = 0, count: int = 40, dtype: torch.dtype = torch.float64, codewords: int = 5
) -> tuple[Tensor, Tensor]:
    """Vectors [2, count / 2, C=3, w=4], tables [3, K, 4]."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, count // 2, 3, 4, generator=generator, dtype=dtype)
    return vectors, torch.randn(3, codewords, 4, generator=generator, dtype=dtype)


def nearest(vectors: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    distance = (vectors[..., None, :] - tables).square().sum(-1)  # [..., C, K]
    codes = distance.argmin(-1)
    return codes, torch.stack([tables[c][codes[..., c]] for c in range(len(tables))], -2)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 1e-4, 0.25])
def test_output_loss_and_gradient_equal_a_re_derivation(noise: float, beta: float) -> None:
    vectors, tables = data()
    layer = NAVQ(tables, noise=noise, commitment=beta, seed=7)
    x = vectors.clone().requires_grad_()
    weight = torch.randn(vectors.shape, dtype=torch.float64)
    found = layer(x)
    ((found.output * weight).sum() + found.commitment).backward()  # type: ignore[no-untyped-call]

    codes, q = nearest(vectors, tables)
    residual = (vectors - q).flatten(0, 1)
    # by hand: after one step the running moments are this batch's
    normal = torch.empty_like(vectors).normal_(generator=torch.Generator().manual_seed(7))
    epsilon = residual.mean(0) + residual.var(0, correction=0).sqrt() * normal
    assert torch.equal(found.codes, codes.int())
    torch.testing.assert_close(found.estimate, q)
    torch.testing.assert_close(found.output, q + noise * epsilon, rtol=1e-10, atol=1e-12)
    tokens = vectors[..., 0, 0].numel()
    expected = beta * (vectors - q).square().sum() / tokens
    torch.testing.assert_close(found.commitment, expected)
    # d output / dx = 1 (straight through), d commitment / dx = 2β(x − q)/tokens
    gradient = weight + 2 * beta * (vectors - q) / tokens
    torch.testing.assert_close(x.grad, gradient, rtol=1e-12, atol=1e-14)


def test_moving_averages_equal_a_computation_by_hand() -> None:
    decay, smoothing = 0.8, 1e-2
    _, tables = data()
    layer = NAVQ(tables, decay=decay, smoothing=smoothing, dead=0.0, noise=0.0)
    counts, sums, now = torch.ones(3, 5, dtype=torch.float64), tables.clone(), tables
    first, second, weight = torch.zeros(3, 4), torch.zeros(3, 4), 0.0
    for step in range(4):
        vectors, _ = data(seed=step)
        layer(vectors)
        codes, q = nearest(vectors, now)
        for c in range(3):
            for k in range(5):
                members = vectors[..., c, :][codes[..., c] == k]
                counts[c, k] = decay * counts[c, k] + (1 - decay) * len(members)
                sums[c, k] = decay * sums[c, k] + (1 - decay) * members.sum(0)
        total = counts.sum(-1, keepdim=True)
        now = sums / ((counts + smoothing) / (total + 5 * smoothing) * total)[..., None]
        residual = (vectors - q).flatten(0, 1)
        first = decay * first + (1 - decay) * residual.mean(0)
        second = decay * second + (1 - decay) * residual.square().mean(0)
        weight = decay * weight + 1 - decay
        torch.testing.assert_close(layer.counts, counts)
        torch.testing.assert_close(layer.tables, now)
        mean, variance = layer.residual
        torch.testing.assert_close(mean, first / weight)
        torch.testing.assert_close(variance, second / weight - (first / weight) ** 2)


def test_noise_has_the_residuals_moments() -> None:
    vectors, tables = data(count=40_000)
    found = NAVQ(tables, noise=1.0)(vectors + 0.5)
    _, q = nearest(vectors + 0.5, tables)
    noise, residual = ((t - q).flatten(0, 1) for t in (found.output, vectors + 0.5))
    torch.testing.assert_close(noise.mean(0), residual.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(noise.var(0), residual.var(0), rtol=0.05, atol=0)


def test_the_share_that_is_left_out() -> None:
    """What a codebook notes of codewords that were trained: of the vectors of the last steps."""
    vectors, tables = data(count=4000, codewords=8)
    vectors = vectors * torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64)[:, None] + 0.5
    layer = NAVQ(tables, decay=0.8)
    assert layer.left_out == 0
    for _ in range(40):
        layer(vectors)
    q = nearest(vectors, layer.tables)[1]
    share = float((vectors - q).square().sum() / vectors.square().sum())
    assert 0.1 < share < 0.9
    assert layer.left_out == pytest.approx(share, rel=0.02)


def test_codewords_come_closer() -> None:
    vectors, tables = data(count=400)
    layer = NAVQ(tables, decay=0.5)
    losses = [float(layer(vectors).commitment) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


def test_evaluation_adds_no_noise_and_changes_nothing() -> None:
    vectors, tables = data()
    layer = NAVQ(tables, noise=1.0)
    layer(vectors)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    found = layer.eval()(vectors)
    _, q = nearest(vectors, layer.tables)
    torch.testing.assert_close(found.output, q)
    assert torch.equal(found.output, layer(vectors).output)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_dead_codewords_are_put_onto_vectors_of_large_error() -> None:
    vectors, tables = data(count=400)
    tables[1, 2] = 1e3  # nobody is nearest to it
    layer = NAVQ(tables, decay=0.5, dead=0.1)
    outlier = vectors.clone()
    outlier[0, 3, 1] = 30.0  # all but certainly drawn: its error is a hundred times the others'
    for _ in range(20):
        layer(outlier)
        if float(layer.tables[1, 2].abs().max()) < 500:
            break
    rows = outlier[..., 1, :].flatten(0, -2)
    assert bool((rows == layer.tables[1, 2]).all(-1).any())
    assert float(layer.counts[1, 2]) == pytest.approx(float(layer.counts[1].sum()) / 5, rel=0.5)
    for _ in range(20):
        layer(outlier)
    assert bool((layer.tables[1] - 30.0).abs().amax(-1).min() < 1.0)


def test_more_dead_codewords_than_vectors() -> None:
    vectors, tables = data(count=4, codewords=64)
    layer = NAVQ(tables, decay=0.1, dead=0.5)
    for _ in range(5):
        assert bool(layer(vectors).output.isfinite().all())
    assert bool(layer.tables.isfinite().all())


def test_a_loaded_state_goes_on_bit_identically() -> None:
    batches = [data(seed=step, dtype=torch.float32)[0] for step in range(6)]
    _, tables = data(dtype=torch.float32)
    whole = NAVQ(tables, decay=0.6, dead=0.3)
    for batch in batches[:3]:
        whole(batch)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    resumed = NAVQ(torch.zeros_like(tables), decay=0.6, dead=0.3, seed=99)
    resumed.load_state_dict(state)
    for batch in batches[3:]:
        assert torch.equal(whole(batch).output, resumed(batch).output)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_padding_counts_nowhere() -> None:
    vectors, tables = data()
    counted = torch.rand(vectors.shape[:2]) < 0.7
    spoiled = vectors.masked_fill(~counted[..., None, None], 1e6)
    layers = NAVQ(tables), NAVQ(tables)
    a, b = layers[0](vectors, counted), layers[1](spoiled, counted)
    assert torch.equal(a.commitment, b.commitment)
    assert torch.equal(a.output[counted], b.output[counted])
    assert torch.equal(layers[0].tables, layers[1].tables)
    assert torch.equal(layers[0].moments, layers[1].moments)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_activations_that_are_not_finite_change_nothing(poison: float) -> None:
    vectors, tables = data()
    layer = NAVQ(tables)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    vectors[0, 1, 2, 3] = poison
    with pytest.raises(ValueError, match="activations: expected finite values"):
        layer(vectors)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -1.0}, "noise: expected 0 or more"),
        ({"commitment": math.nan}, "commitment: expected 0 or more"),
        ({"decay": 1.0}, "decay: expected at least 0 and below 1"),
        ({"dead": -0.1}, "dead: expected"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NAVQ(torch.zeros(1, 2, 3), **options)


def test_tables_and_vectors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="tables: expected fp32 or fp64"):
        NAVQ(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="tables: expected finite"):
        NAVQ(torch.full((1, 2, 3), math.nan))
    with pytest.raises(ValueError, match="vectors: expected"):
        NAVQ(torch.zeros(1, 2, 3))(torch.zeros(5, 1, 4))
