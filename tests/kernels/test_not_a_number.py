"""A NaN never becomes an ordinary answer; -inf means "saw nothing"."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import astra_kernels as ak


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_attention_as_the_reference_has_it(data):
    """One row of queries, or one number in it, is no number, for all kinds of keys and scales."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rows, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    query = torch.rand(2, 4, rows, 8) + 0.1
    key, value = torch.rand(2, 2, 2, tokens, 8) + 0.1
    value = value.clone()
    codes = torch.randint(0, 9, (2, tokens, 2), dtype=torch.int32)
    tables = torch.rand(2, 2, 1, 9, 8) + 0.1
    row = query[0, draw(st.integers(0, 3)), draw(st.integers(0, rows - 1))]
    row[draw(st.sampled_from([slice(None), slice(3, 4)]))] = draw(
        st.sampled_from([math.nan, -math.inf])
    )
    scale = draw(st.sampled_from([None, 0.7, math.nan]))
    mask = torch.arange(tokens).expand(2, -1) > 0
    calls = {
        "dense": lambda impl: ak.attention(query, key, value, scale=scale, impl=impl),
        "causal": lambda impl: ak.attention(
            query, key, value, scale=scale, impl=impl, is_causal=rows <= tokens
        ),
        "masked": lambda impl: ak.attention(
            query, key, value, scale=scale, impl=impl, key_mask=mask
        ),
        "coded": lambda impl: ak.coded_attention(query, codes, *tables, scale=scale, impl=impl),
        "codewords": lambda impl: ak.codeword_attention(
            query, ak.count_codes(codes, 9), *tables, scale=scale, impl=impl
        ),
        "mixed": lambda impl: ak.mixed_attention(
            query, key, value, codes, *tables, scale=scale, impl=impl, return_lse=True
        ),
    }
    call = calls[draw(st.sampled_from(sorted(calls)))]
    assert_equal(call("auto"), call("reference"))


def test_a_score_of_zero_stays_one(impl):
    out, lse = ak.attention(torch.zeros(1, 1, 3, 8), torch.rand(1, 1, 1, 8), torch.ones(1, 1, 1, 8))
    assert (out == 1).all()
    assert (lse == 0).all()


@pytest.mark.parametrize("lse", [math.nan, math.inf])
@pytest.mark.parametrize("other", [0.0, -math.inf, math.inf, math.nan])
def test_merging_what_has_no_weight(impl, lse, other):
    """+inf is how some libraries say that a side is empty; it is not believed."""
    a, b = torch.full((3,), lse), torch.full((3,), other)
    a[1] = b[1] = 0.5
    out_a, out_b = torch.ones(3, 4), torch.full((3, 4), 3.0)
    for state in (
        ak.merge_state(out_a, a, out_b, b, impl=impl),
        ak.merge_state(out_b, b, out_a, a, impl=impl),
    ):
        out, merged = state
        assert out[[0, 2]].isnan().all()
        assert merged[[0, 2]].isnan().all()
        assert (out[1] == 2).all()
