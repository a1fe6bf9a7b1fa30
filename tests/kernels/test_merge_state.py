from __future__ import annotations

import pytest
import torch

import astra_kernels as ak

INF = float("inf")


def state(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype), torch.randn(*shape[:-1], dtype=torch.float64)


def test_float64_exact(impl):
    (out_a, lse_a), (out_b, lse_b) = state(2, 3, 4, 8), state(2, 3, 4, 8)
    weight_a, weight_b = lse_a.exp().unsqueeze(-1), lse_b.exp().unsqueeze(-1)
    total = weight_a + weight_b
    out, lse = ak.merge_state(out_a, lse_a, out_b, lse_b, impl=impl)
    want = (out_a * weight_a + out_b * weight_b) / total
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, total.log().squeeze(-1), rtol=1e-12, atol=1e-12)


def test_far_apart(impl):
    out_a, out_b = torch.randn(5, 8), torch.randn(5, 8)
    lse_a = torch.tensor([1e4, -1e4, 3e38, -3e38, 0.0])
    lse_b = torch.tensor([-1e4, 1e4, -3e37, 3e37, 200.0])
    out, lse = ak.merge_state(out_a, lse_a, out_b, lse_b, impl=impl)
    want = torch.where((lse_a > lse_b).unsqueeze(-1), out_a, out_b)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, torch.maximum(lse_a, lse_b))


@pytest.mark.parametrize("poison", [0.0, float("nan"), INF])
def test_empty_sides_have_no_say(impl, poison):
    (out_a, lse_a), (out_b, lse_b) = state(4, 8), state(4, 8)
    lse_a[[0, 2]] = -INF
    lse_b[[1, 2]] = -INF
    out_a[[0, 2]] = poison
    out_b[[1, 2]] = poison
    out, lse = ak.merge_state(out_a, lse_a, out_b, lse_b, impl=impl)
    assert torch.equal(out[0], out_b[0])
    assert torch.equal(out[1], out_a[1])
    assert torch.equal(out[2], torch.zeros(8, dtype=torch.float64))
    assert torch.equal(lse[:3], torch.stack([lse_b[0], lse_a[1], torch.tensor(-INF).double()]))
    assert out[3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounds_once(impl, dtype):
    out_a, out_b = torch.randn(64, 8).to(dtype), torch.randn(64, 8).to(dtype)
    lse_a, lse_b = torch.randn(64), torch.randn(64)
    out, lse = ak.merge_state(out_a, lse_a, out_b, lse_b, impl=impl)
    want, _ = ak.merge_state(out_a.double(), lse_a.double(), out_b.double(), lse_b.double())
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # weights and sums of fp32 are rounded as well
    steps = 2 if dtype == torch.float32 else 1
    assert ((out - want).abs() <= steps * torch.finfo(dtype).eps * (want.abs() + 1)).all()


def test_layout_of_out_a(impl):
    out_a = torch.randn(2, 5, 3, 8).transpose(1, 2)
    out_b = torch.randn(2, 3, 5, 8)
    lse_a, lse_b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    out, _ = ak.merge_state(out_a, lse_a, out_b, lse_b, impl=impl)
    assert out.stride() == out_a.stride()


def test_empty(impl):
    out, lse = ak.merge_state(*state(2, 0, 8), *state(2, 0, 8), impl=impl)
    assert out.shape == (2, 0, 8)
    assert lse.shape == (2, 0)
