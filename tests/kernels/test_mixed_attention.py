from __future__ import annotations

import exact
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

import astra_kernels as ak
from astra_kernels.coded_attention import reference

INF = float("inf")


def mixed(m=3, length=5, n=6, h=4, kv=2, d=16, k=4, groups=2, b=2, dtype=torch.float64):
    query = torch.randn(b, h, m, d, dtype=dtype)
    key, value = (torch.randn(b, kv, length, d, dtype=dtype) for _ in range(2))
    tables = [torch.randn(kv, groups, k, d // groups, dtype=dtype) for _ in range(2)]
    codes = torch.randint(0, k, (b, n, kv * groups), dtype=torch.int32)
    return query, key, value, codes, *tables


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("length", "n"), [(5, 6), (3, 0), (3, 6)])
def test_float64_exact(impl, is_causal, masked, groups, length, n):
    inputs = mixed(length=length, n=n, groups=groups)
    angle = torch.randn(n, 8, dtype=torch.float64).repeat(1, 2)
    options = {"is_causal": is_causal, "rope": (angle.cos(), angle.sin()), "scale": 0.3}
    if masked:
        options |= {"key_mask": torch.rand(2, length) > 0.5, "code_mask": torch.rand(2, n) > 0.5}
    out, lse = ak.mixed_attention(*inputs, **options, return_lse=True, impl=impl)
    want, want_lse = exact.attend(exact.Case(*inputs, options=options))
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    assert torch.equal(ak.mixed_attention(*inputs, **options, impl=impl), out)


def test_no_dense_tokens(impl):
    query, key, value, codes, *tables = mixed()
    empty = (key[:, :, :0], value[:, :, :0])
    got = ak.mixed_attention(query, *empty, codes, *tables, return_lse=True, impl=impl)
    want = ak.coded_attention(query, codes, *tables, impl=impl)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_visible(impl):
    inputs = mixed()
    hidden = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    options = {"key_mask": hidden[0], "code_mask": hidden[1], "return_lse": True}
    out, lse = ak.mixed_attention(*inputs, **options, impl=impl)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -INF).all()


def test_packed_and_own_value_codes(impl):
    query, key, value, codes, *tables = mixed()
    values = torch.randint(0, 4, codes.shape, dtype=torch.int32)
    want = ak.mixed_attention(query, key, value, codes, *tables, value_codes=values, impl=impl)
    rows = [torch.stack([ak.pack(row, 2) for row in part]) for part in (codes, values)]
    got = ak.mixed_attention(
        query, key, value, rows[0], *tables, value_codes=rows[1], code_bits=2, impl=impl
    )
    assert torch.equal(got, want)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_equals_merged_halves(data):
    m = data.draw(st.integers(1, 5))
    length = data.draw(st.integers(m, 8))
    n = data.draw(st.integers(0, 9))
    impl = data.draw(st.sampled_from(["auto", "reference"]))
    is_causal = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    query, key, value, codes, *tables = mixed(m, length, n)
    local = ak.attention(query, key, value, is_causal=is_causal, impl=impl)
    remote = ak.coded_attention(query, codes, *tables, impl=impl)
    want = ak.merge_state(*local, *remote, impl=impl)
    got = ak.mixed_attention(
        query, key, value, codes, *tables, is_causal=is_causal, return_lse=True, impl=impl
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_at_most_twice_that_of_sdpa(impl, dtype):
    inputs = mixed(64, 64, 100, 4, 2, 64, 32, b=1, dtype=dtype)
    query, key, value, codes, *tables = inputs

    def peer(to):
        looked_up = [reference.look_up(codes, table.to(to)) for table in tables]
        pairs = zip((key, value), looked_up, strict=True)
        keys, values = (torch.cat((near.to(to), far), dim=2) for near, far in pairs)
        return sdpa(query.to(to), keys, values, enable_gqa=True)

    want = peer(torch.float64)
    out = ak.mixed_attention(*inputs, impl=impl)
    assert out.dtype == dtype
    assert (out - want).abs().max() <= 2 * (peer(dtype) - want).abs().max()
