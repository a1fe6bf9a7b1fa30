"""What a rank needs of a call's inputs: positions of remote tokens, values that are finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astra_runtime.inputs import all_finite
from astra_runtime.plan import Plan


@given(st.integers(2, 6), st.integers(0, 40), st.integers(0, 30), st.integers(0, 3))
def test_a_decoders_remote_tokens_are_one_run_of_positions(world_size, extra, halo, copies):
    plan = Plan.make(world_size + extra, world_size, causal=True, halo=halo, copies=copies)
    positions = torch.arange(copies + world_size + extra)[None]
    for rank in range(world_size):
        remote = plan.remote_tokens(positions, rank)[0]
        assert (remote.diff() == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_seen_anywhere(dtype):
    values = torch.full((3, 5, 8), torch.finfo(dtype).max, dtype=dtype)  # whose sum is infinite
    assert bool(all_finite(values))
    assert bool(all_finite(values.transpose(0, 2)[1:]))
    assert bool(all_finite(values[:0]))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 61, 119):
            broken = values.clone()
            broken.view(-1)[place] = wrong
            assert not bool(all_finite(broken))
            assert not bool(all_finite(broken.transpose(0, 2)))
