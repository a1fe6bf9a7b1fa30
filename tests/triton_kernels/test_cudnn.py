"""When dense attention on a GPU goes to cuDNN: the choice here, the result on a device.

On a CPU the choice is made of tensors that only say they are on a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import astra_kernels as ak
from astra_kernels import _dispatch
from astra_kernels._triton.attention import Scores
from astra_kernels._triton.sources import Dense
from astra_kernels.attention import cudnn, kernel


def tensor(*shape, dtype=torch.bfloat16, kind="cuda"):
    strides = torch.empty(shape, device="meta").stride()
    return SimpleNamespace(
        shape=torch.Size(shape),
        ndim=len(shape),
        device=torch.device(kind, 0) if kind == "cuda" else torch.device(kind),
        dtype=dtype,
        element_size=lambda: dtype.itemsize,
        stride=lambda axis=None: strides if axis is None else strides[axis],
    )


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(cudnn, "capability", lambda device: 90)
    monkeypatch.setattr(cudnn, "processors", lambda device: 132)


def quicker(*, m=1024, keys=1024, heads=32, kv_heads=8, d=128, d_v=None, kind="cuda", **more):
    dtype = more.pop("dtype", torch.bfloat16)
    query = tensor(1, heads, m, d, dtype=dtype, kind=kind)
    key = tensor(1, kv_heads, keys, d, dtype=dtype, kind=kind)
    value = tensor(1, kv_heads, keys, d_v or d, dtype=dtype, kind=kind)
    return cudnn._quicker(query, Dense(key, value, **more))


def test_it_takes_what_fills_the_chip(hopper):
    assert quicker()
    assert quicker(is_causal=True)
    assert quicker(heads=12, kv_heads=12, d=64)  # 96 programs
    assert not quicker(m=256, keys=8192)  # 64: keys would not be split
    assert not quicker(m=1)


def test_it_is_asked_for_nothing_that_it_lacks(hopper, monkeypatch):
    some = torch.ones(1, 1024, dtype=torch.bool)
    assert not quicker(mask=some)
    assert not quicker(attn_mask=some)
    assert not quicker(window=(4, 0))
    assert not quicker(is_causal=True, keys=2048)  # its causality is aligned at the top
    assert not quicker(dtype=torch.float32)
    assert not quicker(d_v=64)
    assert not quicker(d=96 + 4)
    assert not quicker(d=256)
    assert not quicker(keys=16)
    assert not quicker(kind="cpu")
    monkeypatch.setattr(cudnn, "capability", lambda device: 80)
    assert not quicker()


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_stay_positive(hopper, scale):
    query = tensor(1, 32, 1024, 128)
    assert cudnn.attention(query, Dense(query, query), scale) is None


@pytest.mark.parametrize(("scores", "asked"), [((None, None), 1), ((5.0, None), 0)])
def test_scores_that_are_changed_stay_here(monkeypatch, scores, asked):
    calls = []
    monkeypatch.setattr(cudnn, "attention", lambda *args: calls.append(args) or "cudnn")
    monkeypatch.setattr(kernel, "attend", lambda *args, **more: "triton")
    query = torch.zeros(1, 2, 3, 16)
    for library in (False, True):
        got = kernel.attend_dense(
            query, Scores(None, *scores), Dense(query, query), library=library
        )
        assert got == ("cudnn" if library and asked else "triton")
    assert len(calls) == asked


def test_only_auto_asks_it(monkeypatch):
    monkeypatch.setattr(_dispatch, "runs_triton", lambda device: True)
    _dispatch._triton.cache_clear()
    device = torch.device("cuda", 0)
    for op in ("attention", "coded_attention", "lookup_linear", "mixed_attention"):
        run = _dispatch.choose(op, "auto", device, torch.bfloat16).run
        assert run.keywords == {"library": True}
        assert run.func is _dispatch._triton(op).run
    assert not hasattr(_dispatch.choose("encode", "auto", device, torch.float32).run, "keywords")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(32, 8, 128), (12, 12, 64), (32, 4, 64)])
def test_it_agrees_with_the_reference(device, causal, heads, kv_heads, d):
    if device == "cpu":
        pytest.skip("needs a GPU")
    query = torch.randn(1, heads, 1024, d, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, kv_heads, 1024, d, dtype=torch.bfloat16)
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is preferred from sm_90 on")
    assert cudnn._quicker(query, Dense(key, value, causal))
    out, lse = ak.attention(query, key, value, is_causal=causal)
    want, want_lse = ak.attention(query, key, value, is_causal=causal, impl="reference")
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-4)
