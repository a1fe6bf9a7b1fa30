"""Merging any number of states in Triton: as exact as float64 rounded, in any layout."""

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


def states(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype), 3 * torch.randn(shape[:-1])


def merge(outs, lses):
    return ak.merge_states(outs, lses, impl="triton")


def assert_rounds_once(got, outs, lses):
    """The weights are fp32's, each sum is one of fp32, rounded to the outputs' dtype once."""
    out, lse = got
    want, want_lse = ak.merge_states(outs.double(), lses.double(), impl="reference")
    assert (out.dtype, lse.dtype) == (outs.dtype, torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    eps, rounding = torch.finfo(out.dtype).eps, (8 + len(outs)) * 2**-24
    scale = outs.double().abs().amax(dim=0) if len(outs) else want
    assert ((out - want).abs() <= eps * want.abs() / 2 + rounding * scale + 1e-7).all()
    seen = want_lse.isfinite()
    assert torch.equal(lse[~seen], want_lse[~seen].float())
    error = (lse[seen] - want_lse[seen]).abs()
    assert (error <= rounding * (want_lse[seen].abs() + 1)).all()


@pytest.mark.parametrize(
    "shape", [(1, 7), (5, 5, 1), (2, 3, 33), (4, 2, 3, 4, 64), (3, 2, 2, 3, 2, 8), (17, 2, 1500)]
)
def test_rounds_once(dtype, shape):
    inputs = states(*shape, dtype=dtype)
    assert_rounds_once(merge(*inputs), *inputs)


def test_outs_are_read_where_they_lie():
    """FlashInfer's order, [T, S, H, d]; rows of padded memory; one state for all."""
    outs, lses = states(5, 3, 4, 8)
    moved = outs.movedim(1, 0), lses.movedim(1, 0)
    padded = torch.randn(3, 2, 5, 6, 24)[..., :4, 8:16], states(3, 2, 5, 4, 8)[1]
    expanded = outs[:1].expand(4, *outs.shape[1:]), lses[:1].expand(4, *lses.shape[1:])
    for inputs in (moved, padded, expanded):
        got, want = merge(*inputs), merge(*(x.contiguous() for x in inputs))
        assert_rounds_once(got, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_two_states_are_merge_state(dtype):
    outs, lses = states(2, 6, 72, dtype=dtype)
    want = ak.merge_state(outs[0], lses[0], outs[1], lses[1], impl="triton")
    for a, b in zip(merge(outs, lses), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("poison", [0.0, math.nan, INF])
def test_empty_states_have_no_say(poison, dtype):
    outs, lses = states(3, 4, 72, dtype=dtype)
    lses[0, 0] = lses[1:, 1] = lses[:, 2] = -INF
    outs[0, 0] = outs[1:, 1] = outs[:, 2] = poison
    out, lse = merge(outs, lses)
    rest = merge(outs[1:, 0], lses[1:, 0])
    assert torch.equal(out[:3], torch.stack([rest[0], outs[0, 1], torch.zeros_like(out[2])]))
    assert torch.equal(lse[:3], torch.stack([rest[1], lses[0, 1], torch.tensor(-INF)]))
    assert out[3].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("lse", [math.nan, INF])
@pytest.mark.parametrize("others", [0.0, -INF, INF])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_weight_is_no_number(lse, others, place):
    lses = torch.full((3, 2), others)
    lses[place, 0] = lse
    out, merged = merge(torch.ones(3, 2, 4), lses)
    assert out[0].isnan().all()
    assert merged[0].isnan()
    if others == 0.0:
        torch.testing.assert_close(out[1], torch.ones(4))


def test_far_apart():
    """The largest has all the weight, however large; sums of large outputs do not overflow."""
    lses = torch.tensor([[1e4, 3e38, -3e38], [-1e4, -3e37, 3e37], [0.0, 0.0, -3e38]])
    outs = torch.randn(3, 3, 8)
    out, lse = merge(outs, lses)
    assert torch.equal(out, torch.stack([outs[0, 0], outs[0, 1], outs[1, 2]]))
    assert torch.equal(lse, lses.amax(dim=0))
    large = torch.full((4, 1, 8), 3e38)
    torch.testing.assert_close(merge(large, torch.zeros(4, 1))[0], large[0])


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0, 0)])
def test_nothing_to_merge(shape):
    outs, lses = states(*shape)
    for a, b in zip(merge(outs, lses), ak.merge_states(outs, lses, impl="reference"), strict=True):
        torch.testing.assert_close(a, b)


@examples(25)
@given(
    count=st.integers(0, 5),
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=4),
    d=st.integers(0, 40),
    data=st.data(),
)
def test_any_shape_and_layout(count, shape, d, data):
    outs, lses = states(count, *shape, d)
    order = [*data.draw(st.permutations(range(outs.ndim)))]
    back = [order.index(axis) for axis in range(len(order))]
    outs = outs.permute(order).contiguous().permute(back)
    assert_rounds_once(merge(outs, lses), outs, lses)
