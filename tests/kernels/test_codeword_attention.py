from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

import astra_kernels as ak

INF = float("inf")


def tables(kv=3, k=6, d=16, dtype=torch.float64):
    return [torch.randn(kv, 1, k, d, dtype=dtype) for _ in range(2)]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_equals_coded_attention_over_any_tokens_with_those_counts(data):
    impl = data.draw(st.sampled_from(["auto", "reference"]))
    shared = data.draw(st.booleans())
    k = data.draw(st.integers(1, 9))
    n = data.draw(st.integers(0, 30))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    query = torch.randn(2, 6, 2, 16, dtype=torch.float64)
    codebooks = tables(k=k)
    codes = torch.randint(0, k, (2, n, 1 if shared else 3), dtype=torch.int32)
    counts = torch.stack([(codes == c).sum(dim=1) for c in range(k)], dim=-1)
    got = ak.codeword_attention(query, counts, *codebooks, scale=0.4, impl=impl)
    want = ak.coded_attention(query, codes, *codebooks, scale=0.4, impl="reference")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_count_dtypes(impl, dtype):
    query = torch.randn(1, 6, 2, 16)
    counts = torch.randint(0, 5, (1, 3, 6))
    codebooks = tables(dtype=torch.float32)
    want = ak.codeword_attention(query, counts, *codebooks, impl=impl)
    got = ak.codeword_attention(query, counts.to(dtype), *codebooks, impl=impl)
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("heads", [1, 3])
def test_codewords_that_do_not_occur_never_matter(impl, heads):
    query = torch.randn(2, 6, 3, 16)
    counts = torch.randint(1, 5, (2, heads, 6))
    counts[:, :, [1, 4]] = 0
    codebooks = tables(dtype=torch.float32)
    want = ak.codeword_attention(query, counts, *codebooks, impl=impl)
    for table, poison in zip(codebooks, (float("nan"), INF), strict=True):
        table[:, :, [1, 4]] = poison
    got = ak.codeword_attention(query, counts, *codebooks, impl=impl)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("heads", [1, 3])
def test_no_tokens(impl, heads):
    query = torch.randn(2, 6, 3, 16)
    counts = torch.randint(1, 5, (2, heads, 6))
    counts[1] = 0
    out, lse = ak.codeword_attention(query, counts, *tables(dtype=torch.float32), impl=impl)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert (lse[1] == -INF).all()
    assert lse[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_at_most_twice_that_of_sdpa(impl, dtype):
    query = torch.randn(1, 6, 64, 64, dtype=dtype)
    key, value = tables(6, 64, 64, dtype)
    counts = torch.randint(0, 9, (1, 1, 64))
    tokens = torch.arange(64).repeat_interleave(counts[0, 0])

    def peer(to):
        return sdpa(query.to(to), key[None, :, 0, tokens].to(to), value[None, :, 0, tokens].to(to))

    want = peer(torch.float64)
    out, _ = ak.codeword_attention(query, counts, key, value, impl=impl)
    assert out.dtype == dtype
    assert (out - want).abs().max() <= 2 * (peer(dtype) - want).abs().max()
