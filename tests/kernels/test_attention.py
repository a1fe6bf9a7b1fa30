from __future__ import annotations

import exact
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import astra_kernels as ak

INF = float("inf")


def dense(b=2, h=6, kv=3, m=4, n=7, d=16, dtype=torch.float64):
    query = torch.randn(b, h, m, d, dtype=dtype)
    key = torch.randn(b, kv, n, d, dtype=dtype)
    return query, key, torch.randn(b, kv, n, d, dtype=dtype)


@pytest.mark.parametrize(
    "shape", [(2, 6, 3, 4, 7), (1, 4, 4, 7, 7), (1, 3, 1, 1, 5), (2, 2, 2, 3, 3)]
)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_float64_exact(impl, shape, is_causal, masked):
    query, key, value = dense(*shape)
    mask = torch.rand(key.shape[0], key.shape[2]) > 0.4 if masked else None
    options = {"is_causal": is_causal, "key_mask": mask, "scale": 0.3}
    out, lse = ak.attention(query, key, value, **options, impl=impl)
    want, want_lse = exact.attend(exact.Case(query, key, value, options=options))
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [16, 72, 80, 96, 256, 33])
def test_default_scale_and_any_dim(impl, d):
    query, key, value = dense(1, 2, 1, 3, 9, d)
    out, lse = ak.attention(query, key, value, impl=impl)
    want, want_lse = exact.attend(exact.Case(query, key, value))
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("extra", [0, 1, 130])
def test_causal_in_blocks(rows, extra):
    query, key, value = dense(1, 4, 2, rows, rows + extra, 16)
    out, lse = ak.attention(query, key, value, is_causal=True)
    want, want_lse = ak.attention(query, key, value, is_causal=True, impl="reference")
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_hidden_content_never_matters(impl, is_causal):
    query, key, value = dense(dtype=torch.float32)
    mask = torch.rand(2, 7) > 0.5
    mask[:, -1] = True
    options = {"is_causal": is_causal, "key_mask": mask, "impl": impl}
    want = ak.attention(query, key, value, **options)
    hidden = ~mask[:, None, :, None]
    poisoned = (x.masked_fill(hidden, p) for x, p in ((key, float("nan")), (value, INF)))
    got = ak.attention(query, *poisoned, **options)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_nothing_visible(impl):
    query, key, value = dense(dtype=torch.float32)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1] = False
    out, lse = ak.attention(query, key, value, key_mask=mask, impl=impl)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert (lse[1] == -INF).all()
    assert lse[0].isfinite().all()
    empty = (key[:, :, :0], value[:, :, :0])
    out, lse = ak.attention(query, *empty, impl=impl)
    assert torch.equal(out, torch.zeros_like(query))
    assert (lse == -INF).all()


def test_causal_rows_before_the_first_visible_key(impl):
    query, key, value = dense(1, 2, 2, 6, 6, dtype=torch.float32)
    mask = torch.tensor([[False, False, True, True, False, True]])
    out, lse = ak.attention(query, key, value, is_causal=True, key_mask=mask, impl=impl)
    assert torch.equal(out[:, :, :2], torch.zeros(1, 2, 2, 16))
    assert (lse[:, :, :2] == -INF).all()
    assert lse[:, :, 2:].isfinite().all()


def test_no_queries(impl):
    query, key, value = dense(m=0)
    out, lse = ak.attention(query, key, value, impl=impl)
    assert out.shape == (2, 6, 0, 16)
    assert lse.shape == (2, 6, 0)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": (1, 1)}], ids=str)
def test_neither_queries_nor_keys(impl, options):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        query, key, value = dense(m=0, n=0, dtype=dtype)
        out, lse = ak.attention(query, key, value, impl=impl, **options)
        assert out.shape == (2, 6, 0, 16)
        assert lse.shape == (2, 6, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_error_at_most_twice_that_of_sdpa(impl, dtype, is_causal):
    query, key, value = dense(1, 6, 3, 200, 200, 64, dtype)
    peer = sdpa(query, key, value, is_causal=is_causal, enable_gqa=True)
    want = sdpa(query.double(), key.double(), value.double(), is_causal=is_causal, enable_gqa=True)
    out, lse = ak.attention(query, key, value, is_causal=is_causal, impl=impl)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert (out - want).abs().max() <= 2 * (peer - want).abs().max()


def test_layout_and_strided_input(impl):
    query, key, value = dense(1, 4, 2, 5, 9, 16, torch.float32)
    want, want_lse = ak.attention(query, key, value, impl=impl)
    assert want.transpose(1, 2).is_contiguous()
    assert want_lse.is_contiguous()
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (query, key, value)]
    out, lse = ak.attention(*strided, impl=impl)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_queries_of_no_width_and_windows_beyond_integers_are_refused() -> None:
    empty, query = torch.randn(1, 1, 2, 0), torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="d of at least 1"):
        ak.attention(empty, empty, empty)
    with pytest.raises(ValueError, match="window must be of sides"):
        ak.attention(query, query, query, window=(2**63, 0))
