"""Counting codes in Triton beside the reference: histograms and additions in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import astra_kernels as ak
from astra_kernels.count_codes import kernel
from astra_kernels.pack import reference as pack_reference
from tests.triton_kernels.cases import examples


def count(codes, codewords, **options):
    return ak.count_codes(codes, codewords, impl="triton", **options)


def want(codes, codewords, **options):
    return ak.count_codes(codes, codewords, impl="reference", **options)


def pack_rows(codes, bits):
    return torch.stack([pack_reference.pack(row, bits) for row in codes])


@pytest.mark.parametrize(
    ("codewords", "tokens"),
    [*((k, 2500) for k in (1, 2, 31, 33, 1000, 2048, 2049, 65536)), (31, 1), (2049, 1023)],
)
def test_exact(codewords, tokens):
    codes = torch.randint(0, codewords, (2, tokens, 2), dtype=torch.int32)
    counts = count(codes, codewords)
    assert counts.dtype == torch.int32
    assert torch.equal(counts, want(codes, codewords))


@pytest.mark.parametrize("tokens", [kernel.OF_MANY - 1, 2 * kernel.OF_MANY + 1])
def test_many_are_read_at_once(monkeypatch, tokens):
    monkeypatch.setattr(kernel, "MANY", 2)
    codes = torch.randint(0, 1000, (1, tokens, 2), dtype=torch.int32)
    assert torch.equal(count(codes, 1000), want(codes, 1000))


@pytest.mark.parametrize("bits", range(1, 17))
def test_packed_codes_are_read_where_they_lie(monkeypatch, bits):
    codewords = 1 << bits
    codes = torch.randint(0, codewords, (2, 37, 3), dtype=torch.int32)
    mask = torch.rand(2, 37) > 0.3
    packed = pack_rows(codes, bits)
    options = {"code_bits": bits, "codes_per_token": 3}
    monkeypatch.setattr("astra_kernels._library.quantization.unpack_rows", None)
    got = count(packed, codewords, code_mask=mask, check=False, **options)
    assert torch.equal(got, want(codes, codewords, code_mask=mask))


@examples(40)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 1100), st.integers(0, 4)),
    codewords=st.integers(1, 5000),
    masked=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_shape(shape, codewords, masked, index):
    codes = torch.randint(0, codewords, shape, dtype=index)
    mask = torch.rand(shape[:2]) > 0.5 if masked else None
    assert torch.equal(
        count(codes, codewords, code_mask=mask), want(codes, codewords, code_mask=mask)
    )


def test_skewed():
    codes = torch.full((1, 3000, 1), 7, dtype=torch.int32)
    for codewords in (8, 8192):
        counts = count(codes, codewords)
        assert counts[0, 0, 7] == counts.sum() == 3000


def test_strided():
    codes = torch.randint(0, 50, (3, 40, 2), dtype=torch.int32).transpose(0, 2)
    mask = (torch.rand(40, 2) > 0.5).t()
    assert torch.equal(count(codes, 50, code_mask=mask), want(codes, 50, code_mask=mask))


@pytest.mark.parametrize("codewords", [5, 5000])
def test_codes_out_of_range(codewords):
    codes = torch.tensor([[[0], [-1], [codewords], [2**31 - 1]]], dtype=torch.int32)
    with pytest.raises(ValueError, match="codes must be in"):
        count(codes, codewords, check=True)
    counts = count(codes, codewords, check=False)
    assert counts[0, 0, 0] == 1
    assert counts[0, 0, -1] == counts.sum() - 1 == 3
    mask = torch.tensor([[True, False, False, False]])
    assert count(codes, codewords, code_mask=mask, check=True).sum() == 1


@pytest.mark.parametrize("programs", [1, 3, 10_000])
def test_any_number_of_shares(monkeypatch, programs):
    monkeypatch.setattr(kernel, "PROGRAMS", 1)
    monkeypatch.setattr(kernel, "processors", lambda _: programs)
    codes = torch.randint(0, 50, (2, 3500, 1), dtype=torch.int32)
    assert torch.equal(count(codes, 50), want(codes, 50))
