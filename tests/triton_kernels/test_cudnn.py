"""When dense attention on a GPU goes to cuDNN: the choice here, the result on a device.

On a CPU the choice is made of tensors that only say they are on a GPU.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

import astra_kernels as ak
from astra_kernels import _dispatch
from astra_kernels._triton.attention import Scores
from astra_kernels._triton.sources import Counted, Dense
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
    for op in sorted(_dispatch._LIBRARY):
        run = _dispatch.choose(op, "auto", device, torch.bfloat16).run
        assert isinstance(run, functools.partial)
        assert run.keywords == {"library": True}
        assert run.func is _dispatch._triton(op).run
    assert not hasattr(_dispatch.choose("encode", "auto", device, torch.float32).run, "keywords")


def counted_case(batch=2, heads=4, kv_heads=2, m=5, codewords=37, d=24, shared=False):
    query = torch.randn(batch, heads, m, d).bfloat16()
    counts = torch.randint(0, 9, (batch, 1 if shared else kv_heads, codewords), dtype=torch.int32)
    counts[0, 0] = 0  # no tokens at all
    tables = torch.randn(2, kv_heads, 1, codewords, d).bfloat16()
    unused = (counts == 0).all(0).all(0)
    tables[:, :, :, unused] = torch.nan
    return query, Counted(counts, *tables)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scale", [None, 0.01, 3.0])
def test_counts_become_channels(monkeypatch, shared, scale):
    """cuDNN's part is done by a plain attention, in float64."""

    def attend(query, key, value, causal, scale):
        assert not causal
        out, lse = ak.attention(
            *(x.double() for x in (query, key, value)), scale=scale, impl="reference"
        )
        return out.bfloat16(), lse.float()

    monkeypatch.setattr(cudnn, "_quicker_over_codewords", lambda *_: True)
    monkeypatch.setattr(cudnn, "_taken", lambda *_: True)
    monkeypatch.setattr(cudnn, "_run", attend)
    query, counted = counted_case(shared=shared)
    stored = query.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = cudnn.codeword_attention(stored, counted, scale)
    tables = (table.double() for table in counted[1:])
    want, want_lse = ak.codeword_attention(
        query.double(), counted.counts, *tables, scale=scale, impl="reference"
    )
    assert (lse[0, : 4 if shared else 2] == -torch.inf).all()
    torch.testing.assert_close(out.double(), want, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


def test_codewords_of_what_it_is_quicker_for(hopper):
    def asked(dtype=torch.bfloat16, d=128, m=1024, codewords=1024):
        query, table = tensor(1, 32, m, d, dtype=dtype), tensor(8, 1, codewords, d, dtype=dtype)
        counts = tensor(1, 8, codewords, dtype=torch.int32)
        return cudnn._quicker_over_codewords(query, Counted(counts, table, table))

    assert asked()
    assert not asked(d=64)
    assert not asked(m=1)
    assert not asked(dtype=torch.float16)
    assert not asked(codewords=8)


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


@pytest.mark.gpu
@pytest.mark.parametrize("empty", [False, True])
def test_codewords_agree_with_the_reference(device, empty):
    if device == "cpu":
        pytest.skip("needs a GPU")
    query, counted = counted_case(2, 32, 8, 1024, 1000, 128)
    if not empty:
        counted.counts[0, 0, 0] = 3
    tables = [table.nan_to_num() for table in counted[1:]]
    out, lse = ak.codeword_attention(query, *counted)
    want, want_lse = ak.codeword_attention(query, counted.counts, *tables, impl="reference")
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-4)
