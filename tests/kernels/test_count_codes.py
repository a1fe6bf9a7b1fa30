from __future__ import annotations

import re

import pytest
import torch

import astra_kernels as ak


def counted(codes, codewords, mask=None):
    """Token by token."""
    counts = torch.zeros(codes.shape[0], codes.shape[2], codewords, dtype=torch.int32)
    for row, token, place in torch.ones_like(codes).nonzero().tolist():
        if mask is None or mask[row, token]:
            counts[row, place, codes[row, token, place]] += 1
    return counts


def pack_rows(codes, bits):
    return torch.stack([ak.pack(row, bits) for row in codes])


@pytest.mark.parametrize("shape", [(2, 7, 3), (1, 40, 1), (3, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("masked", [False, True])
def test_exact(impl, shape, dtype, masked):
    codes = torch.randint(0, 5, shape, dtype=dtype)
    mask = torch.rand(shape[:2]) > 0.4 if masked else None
    counts = ak.count_codes(codes, 5, code_mask=mask, impl=impl)
    assert counts.dtype == torch.int32
    assert torch.equal(counts, counted(codes, 5, mask))


@pytest.mark.parametrize("bits", [1, 3, 8, 11, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_packed(impl, bits, masked):
    codes = torch.randint(0, 2, (2, 7, 3), dtype=torch.int32)
    mask = torch.rand(2, 7) > 0.4 if masked else None
    options = {"code_mask": mask} if masked else {"num_tokens": 7}
    packed = pack_rows(codes, bits)
    got = ak.count_codes(packed, 2, code_bits=bits, codes_per_token=3, **options, impl=impl)
    assert torch.equal(got, counted(codes, 2, mask))


def test_packed_codes_tell_their_number(impl):
    codes = torch.randint(0, 9, (2, 7, 3), dtype=torch.int32)
    got = ak.count_codes(pack_rows(codes, 4), 9, code_bits=4, codes_per_token=3, impl=impl)
    assert torch.equal(got, counted(codes, 9))


def test_hidden_codes_may_be_anything(impl):
    codes = torch.tensor([[[1], [-7], [2], [99]]])
    mask = torch.tensor([[True, False, True, False]])
    got = ak.count_codes(codes, 4, code_mask=mask, impl=impl)
    assert got.tolist() == [[[0, 1, 1, 0]]]


@pytest.mark.parametrize("shape", [(0, 4, 2), (2, 0, 3), (2, 4, 0)])
def test_empty(impl, shape):
    got = ak.count_codes(torch.zeros(shape, dtype=torch.int32), 5, impl=impl)
    assert torch.equal(got, torch.zeros(shape[0], shape[2], 5, dtype=torch.int32))


def test_empty_packed(impl):
    options = {"code_bits": 3, "num_tokens": 0, "codes_per_token": 2, "impl": impl}
    for rows in (0, 2):
        got = ak.count_codes(torch.zeros(rows, 0, dtype=torch.uint8), 5, **options)
        assert torch.equal(got, torch.zeros(rows, 2, 5, dtype=torch.int32))


@pytest.mark.parametrize("codewords", [1, 65536])
def test_fewest_and_most_codewords(impl, codewords):
    codes = torch.tensor([[[0], [codewords - 1], [codewords - 1]]])
    counts = ak.count_codes(codes, codewords, impl=impl)
    assert counts.sum() == 3
    assert counts[0, 0, codewords - 1] == (3 if codewords == 1 else 2)


def test_strided(impl):
    codes = torch.randint(0, 5, (3, 7, 2)).transpose(0, 2)
    assert torch.equal(ak.count_codes(codes, 5, impl=impl), counted(codes, 5))


@pytest.mark.parametrize("heads", [1, 2])
def test_counts_are_those_of_codeword_attention(heads):
    """Counted, then attended to: what coded attention over the tokens gives."""
    codes = torch.randint(0, 6, (2, 30, heads), dtype=torch.int32)
    query, tables = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 1, 6, 8)
    got = ak.codeword_attention(query, ak.count_codes(codes, 6), *tables)
    want = ak.coded_attention(query, codes, *tables, impl="reference")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (4, {"code_bits": 4}, "codes_per_token must be given when codes are packed"),
        (4, {"code_bits": 4, "codes_per_token": 1}, "num_tokens must be given when a token takes"),
        (4, {"code_bits": 17, "codes_per_token": 1, "num_tokens": 1}, "code_bits must be from 1"),
        (
            4,
            {"code_bits": 5, "codes_per_token": 2, "num_tokens": 4},
            "codes must be [2, ceil(N*C*5/8)] with C = 2 and N = 4",
        ),
    ],
)
def test_packed_sizes_that_do_not_fit(impl, size, options, message):
    packed = torch.zeros(2, size, dtype=torch.uint8)
    with pytest.raises(ValueError, match=re.escape(message)):
        ak.count_codes(packed, 5, **options, impl=impl)


def test_packed_code_out_of_range(impl):
    packed = pack_rows(torch.tensor([[[0], [7]]], dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=re.escape("got 7 at index [0, 1, 0]")):
        ak.count_codes(packed, 7, code_bits=3, codes_per_token=1, num_tokens=2, impl=impl)
