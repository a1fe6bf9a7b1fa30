"""Merging in Triton: in any layout, within one rounding of float64, empty sides without a say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import astra_kernels as ak
from tests.triton_kernels.cases import examples

pytestmark = pytest.mark.usefixtures("poisoned")

INF = math.inf


def merge(*states):
    return ak.merge_state(*states, impl="triton")


def states(*shape, dtype=torch.float32):
    sides = [(torch.randn(shape).to(dtype), 3 * torch.randn(shape[:-1])) for _ in range(2)]
    return [tensor for side in sides for tensor in side]


def assert_rounds_once(got, inputs):
    """The weights are fp32's, the sum is rounded to the outputs' dtype once."""
    out, lse = got
    want, want_lse = ak.merge_state(*(x.double() for x in inputs), impl="reference")
    eps = torch.finfo(out.dtype).eps
    scale = torch.maximum(inputs[0].abs(), inputs[2].abs()).double()
    assert ((out - want).abs() <= eps * want.abs() / 2 + 8 * 2**-24 * scale + 1e-7).all()
    assert ((lse - want_lse).abs() <= 4 * 2**-24 * (want_lse.abs() + 1)).all()
    assert out.dtype == inputs[0].dtype
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(
    "shape", [(7,), (5, 1), (3, 33), (2, 3, 4, 64), (2, 2, 3, 2, 8), (2, 1500)]
)
def test_rounds_once(dtype, shape):
    inputs = states(*shape, dtype=dtype)
    got = merge(*inputs)
    assert_rounds_once(got, inputs)
    assert got[0].stride() == inputs[0].stride()


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 2, 0, 3), (3, 1, 0, 2)]
)
@pytest.mark.parametrize("same", [True, False])
def test_layouts(order, same):
    """out_a is stored in the order of the axes that is given, out_b too or contiguously."""
    inputs = states(2, 3, 5, 8)
    back = [order.index(axis) for axis in range(4)]
    for place in (0, 2) if same else (0,):
        inputs[place] = inputs[place].permute(order).contiguous().permute(back)
    got = merge(*inputs)
    assert_rounds_once(got, inputs)
    assert got[0].stride() == inputs[0].stride()
    assert got[1].is_contiguous()


def test_inputs_that_are_views():
    inputs = states(4, 6, 10, 8)
    want = merge(*(x[::2, :, 1:5] for x in inputs))
    got = merge(*(x[::2, :, 1:5].contiguous() for x in inputs))
    expanded = [x[:1].expand(4, *x.shape[1:]) for x in inputs]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert_rounds_once(merge(*expanded), expanded)


@pytest.mark.parametrize("poison", [0.0, math.nan, INF])
def test_empty_sides_have_no_say(poison, dtype):
    out_a, lse_a, out_b, lse_b = states(4, 72, dtype=dtype)
    lse_a[[0, 2]] = -INF
    lse_b[[1, 2]] = -INF
    out_a[[0, 2]] = poison
    out_b[[1, 2]] = poison
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out[:3], torch.stack([out_b[0], out_a[1], torch.zeros_like(out_a[0])]))
    assert torch.equal(lse[:3], torch.stack([lse_b[0], lse_a[1], torch.tensor(-INF)]))
    assert out[3].isfinite().all()


def test_far_apart():
    out_a, out_b = torch.randn(5, 8), torch.randn(5, 8)
    lse_a = torch.tensor([1e4, -1e4, 3e38, -3e38, 0.0])
    lse_b = torch.tensor([-1e4, 1e4, -3e37, 3e37, 200.0])
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out, torch.where((lse_a > lse_b).unsqueeze(-1), out_a, out_b))
    assert torch.equal(lse, torch.maximum(lse_a, lse_b))


def test_a_broken_lse_shows():
    out_a, lse_a, out_b, lse_b = states(2, 8)
    lse_a[0] = math.nan
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    assert out[0].isnan().all()
    assert lse[0].isnan()
    assert out[1].isfinite().all()


@examples(40)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=5),
    d=st.integers(0, 40),
    data=st.data(),
)
def test_any_shape_and_layout(shape, d, data):
    inputs = states(*shape, d)
    order = [*data.draw(st.permutations(range(len(shape)))), len(shape)]
    back = [order.index(axis) for axis in range(len(order))]
    for place in (0, 2):
        inputs[place] = inputs[place].permute(order).contiguous().permute(back)
    got = merge(*inputs)
    assert_rounds_once(got, inputs)
    assert got[0].stride() == torch.empty_like(inputs[0]).stride()


def test_merging_shares_is_attention():
    query = torch.randn(1, 4, 3, 16)
    key, value = torch.randn(2, 1, 2, 20, 16)
    whole = ak.attention(query, key, value)
    halves = [
        ak.attention(query, key[:, :, part], value[:, :, part])
        for part in (slice(0, 7), slice(7, 20))
    ]
    torch.testing.assert_close(merge(*halves[0], *halves[1]), whole)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("lse", [math.nan, math.inf])
@pytest.mark.parametrize("other", [0.0, -math.inf, math.inf])
def test_no_weight_is_no_number(lse, other):
    a, b = torch.full((3,), lse), torch.full((3,), other)
    for state in ((torch.ones(3, 4), a, torch.ones(3, 4), b),
                  (torch.ones(3, 4), b, torch.ones(3, 4), a)):  # fmt: skip
        out, merged = ak.merge_state(*state, impl="triton")
        assert out.isnan().all()
        assert merged.isnan().all()
