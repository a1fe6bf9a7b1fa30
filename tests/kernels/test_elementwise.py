"""RMS norm, the gate of an MLP and rotary positions in C++, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from astra_kernels import _elementwise as elementwise
from astra_kernels._elementwise import native, reference


@pytest.fixture(autouse=True, params=[1, 2], ids=lambda threads: f"{threads} threads")
def without_gradients(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 3), (3, 64), (2, 40, 576), (0, 8), (2, 0, 8)])
def test_norm_and_gate(shape: tuple[int, ...]) -> None:
    x, up, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    assert native.can_run(x, up, weight)
    want = reference.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(elementwise.rms_norm(x, weight, 1e-5), want.float())
    want = reference.gated_silu(x.double(), up.double())
    torch.testing.assert_close(elementwise.gated_silu(x, up), want.float())


@pytest.mark.parametrize("angles", [1, 2])
@pytest.mark.parametrize(
    ("heads", "tokens", "width"), [(1, 1, 2), (3, 5, 6), (9, 70, 64), (2, 0, 8)]
)
def test_rotation(heads: int, tokens: int, width: int, angles: int) -> None:
    x = torch.randn(2, tokens, heads, width).transpose(1, 2)  # as a projection gives it
    cos, sin = torch.randn(2, angles, tokens, width)
    want = reference.rotate(x.double(), cos.double(), sin.double()).float()
    torch.testing.assert_close(elementwise.rotate(x, cos, sin), want)
    torch.testing.assert_close(elementwise.rotate(x.contiguous(), cos, sin), want)
    room = torch.zeros(2, tokens, heads + 2, width)
    out = room[:, :, 1:-1].transpose(1, 2)
    assert elementwise.rotate(x, cos, sin, out) is out
    torch.testing.assert_close(out, want)
    assert not room[:, :, [0, -1]].any()
    assert elementwise.rotate(x, cos, sin, x) is x
    torch.testing.assert_close(x, want)


def test_what_is_not_finite_stays() -> None:
    x = torch.tensor([[float("nan"), 1.0, 2.0], [float("inf"), 1.0, -float("inf")]])
    torch.testing.assert_close(
        elementwise.gated_silu(x, torch.ones(2, 3)),
        reference.gated_silu(x, torch.ones(2, 3)),
        equal_nan=True,
    )
    torch.testing.assert_close(
        elementwise.rms_norm(x, torch.ones(3), 1e-5),
        reference.rms_norm(x, torch.ones(3), 1e-5),
        equal_nan=True,
    )


def test_other_dtypes_rows_that_skip_and_gradients_go_by_the_formula() -> None:
    x = torch.randn(2, 4, 6, 8)
    cos, sin = torch.randn(2, 1, 6, 8)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        found = elementwise.rotate(x.to(dtype), cos.to(dtype), sin.to(dtype))
        assert torch.equal(found, reference.rotate(x.to(dtype), cos.to(dtype), sin.to(dtype)))
        assert elementwise.rms_norm(x.to(dtype), torch.ones(8, dtype=dtype), 1e-5).dtype == dtype
    skipping = torch.randn(2, 4, 6, 16)[..., ::2]
    assert not native.can_run(skipping)
    want = reference.rotate(skipping, cos, sin)
    torch.testing.assert_close(elementwise.rotate(skipping, cos, sin), want)
    out = torch.empty(2, 4, 6, 16)[..., ::2]
    torch.testing.assert_close(elementwise.rotate(x, cos, sin, out), reference.rotate(x, cos, sin))
    with torch.enable_grad():
        gate = torch.randn(3, 8, requires_grad=True)
        elementwise.gated_silu(gate, torch.ones(3, 8)).sum().backward()
        assert gate.grad is not None
    rows = torch.vmap(lambda row: elementwise.rms_norm(row, torch.ones(8), 1e-5))(x)
    torch.testing.assert_close(rows, reference.rms_norm(x, torch.ones(8), 1e-5))
