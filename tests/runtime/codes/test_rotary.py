"""Rotary positions: the quick way and the one with a gradient give the same numbers."""

from __future__ import annotations

import pytest
import torch

from astra_runtime.codes.rotary import inverse, rotate, unrotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_without_a_gradient_the_numbers_are_the_same(dtype: torch.dtype, batch: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 7, 3 * 8, dtype=dtype)
    keys = rows.unflatten(-1, (3, 8)).transpose(1, 2)  # as a projection leaves them
    angles = torch.randn(batch, 7, 4, dtype=torch.float64).repeat(1, 1, 2)
    rope = angles.cos().float(), angles.sin().float()
    before = keys.clone()
    with torch.enable_grad():
        slow, back = rotate(keys, rope), unrotate(keys, rope)
    with torch.no_grad():
        assert torch.equal(rotate(keys, rope), slow)
        assert torch.equal(unrotate(keys, rope), back)
        assert torch.equal(rotate(keys, inverse(rope, dtype)), back)
    assert torch.equal(keys, before)


def test_a_gradient_passes() -> None:
    keys = torch.randn(1, 1, 3, 4, requires_grad=True)
    angles = torch.randn(1, 3, 2).repeat(1, 1, 2)
    rotate(keys, (angles.cos(), angles.sin())).square().sum().backward()
    assert keys.grad is not None
    assert torch.allclose(keys.grad, 2 * keys, atol=1e-5)  # a rotation keeps lengths
