"""What a rank needs of a call's positions: whether those of its remote tokens follow each other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import astra_kernels as ak
from astra_runtime.codes.packed import TableLookup
from astra_runtime.codes.rotary import ConsecutiveAngles
from astra_runtime.inputs import Views, all_finite
from astra_runtime.models import adapt
from astra_runtime.plan import Plan

from .models import inputs_for, tiny

MODEL = tiny("llama")  # which an adapter does not keep


@given(st.integers(2, 6), st.integers(0, 40), st.integers(0, 30), st.integers(0, 3))
def test_a_decoders_remote_tokens_are_one_run_of_positions(world_size, extra, halo, copies):
    plan = Plan.make(world_size + extra, world_size, causal=True, halo=halo, copies=copies)
    positions = torch.arange(copies + world_size + extra)[None]
    for rank in range(world_size):
        remote = plan.remote_tokens(positions, rank)[0]
        assert (remote.diff() == 1).all()


@pytest.fixture(scope="module")
def adapter():
    return adapt(MODEL)


def test_positions_follow_each_other_unless_there_is_padding(adapter):
    plan, inputs = Plan.make(23, 3, causal=True), inputs_for("llama")
    views = Views.of(adapter, inputs, plan, 2)
    assert isinstance(views.remote_rope, ConsecutiveAngles)
    assert Views.of(adapter, inputs, plan, 0).remote_rope is None
    mask = torch.ones(1, 23, dtype=torch.bool)
    mask[0, :4] = False
    padded = Views.of(adapter, inputs | {"attention_mask": mask}, plan, 2)
    assert not isinstance(padded.remote_rope, ConsecutiveAngles)


def test_decoding_takes_angles_in_fp32_on_a_gpu(adapter):
    plan, inputs = Plan.make(23, 3, causal=True), inputs_for("llama")
    exact = Views.of(adapter, inputs, plan, 2)
    rounded = ConsecutiveAngles(*(x.bfloat16() for x in exact.remote_rope))
    views = replace(exact, remote_rope=rounded)
    positions = adapter.positions(inputs)
    assert views.for_decoding(adapter, positions, plan, 2) is views
    gpu = SimpleNamespace(device=torch.device("cuda"), rope=adapter.rope)
    decoding = views.for_decoding(gpu, positions, plan, 2)
    assert isinstance(decoding.remote_rope, ConsecutiveAngles)
    for got, want in zip(decoding.remote_rope, exact.remote_rope, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("consecutive", [False, True])
def test_attention_is_told_so(monkeypatch, consecutive):
    given = {}
    monkeypatch.setattr(ak, "coded_attention", lambda *args, **options: given.update(options))
    angles = torch.zeros(1, 5, 8), torch.zeros(1, 5, 8)
    rope = ConsecutiveAngles(*angles) if consecutive else angles
    codec = SimpleNamespace(keys=[None], values=[None])
    TableLookup.attend(codec, 0, torch.zeros(1, 2, 1, 8), torch.zeros(1, 5, 2), rope, None, 1.0)
    assert given["rope_consecutive"] is consecutive


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
