"""encode_packed gives the bytes that encode and pack give, and that coded_attention reads."""

from __future__ import annotations

import pytest
import torch

import astra_kernels as ak


def packed_rows(codes, bits):
    return torch.stack([ak.pack(row, bits) for row in codes])


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (7, 3), (16, 2)])
def test_same_bytes_as_encode_and_pack(impl, bits, tokens, groups):
    """Every row starts at a byte; unused bits of its last one are zero."""
    vectors = torch.randn(3, tokens, groups, 4)
    codebook = torch.randn(groups, min(2**bits, 300), 4)
    packed = ak.encode_packed(vectors, codebook, bits, impl=impl)
    assert packed.dtype == torch.uint8
    codes = ak.encode(vectors, codebook, impl=impl)
    assert torch.equal(packed, packed_rows(codes, bits))


def test_more_bits_than_the_codewords_need(impl):
    vectors, codebook = torch.randn(2, 5, 1, 4), torch.randn(1, 3, 4)
    packed = ak.encode_packed(vectors, codebook, 11, impl=impl)
    assert torch.equal(packed, packed_rows(ak.encode(vectors, codebook), 11))


def test_most_codewords():
    codebook = torch.randn(1, 65536, 2)
    vectors = codebook[0, [65535, 0, 40000]].view(1, 3, 1, 2)
    packed = ak.encode_packed(vectors, codebook, 16)
    assert packed.tolist() == [[255, 255, 0, 0, 40000 % 256, 40000 // 256]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_options_of_encode(impl, dtype):
    """Dtypes, norms and vectors of any strides."""
    vectors = torch.randn(3, 8, 2, 9, dtype=torch.float64).permute(1, 3, 0, 2)[:2].to(dtype)
    vectors, codebook = vectors[..., :2], torch.randn(3, 16, 2).to(dtype)
    norms = codebook.double().square().sum(dim=-1) / 2
    packed = ak.encode_packed(vectors, codebook, 4, half_norms=norms, impl=impl)
    codes = ak.encode(vectors, codebook, half_norms=norms, impl=impl)
    assert torch.equal(packed, packed_rows(codes, 4))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_encode(impl, batch, tokens):
    vectors = torch.randn(batch, tokens, 3, 4)
    packed = ak.encode_packed(vectors, torch.randn(3, 8, 4), 3, impl=impl)
    assert packed.shape == (batch, (tokens * 9 + 7) // 8)
    assert packed.dtype == torch.uint8


@pytest.mark.parametrize("tokens", [1, 9])
def test_coded_attention_reads_it(tokens):
    tables = torch.randn(2, 2, 3, 8, 4)  # keys and values: [Hkv, S, K, d/S]
    query, vectors = torch.randn(2, 4, 5, 12), torch.randn(2, tokens, 6, 4)
    codebook = torch.randn(6, 8, 4)
    packed = ak.encode_packed(vectors, codebook, 3)
    options = {"code_bits": 3, "num_tokens": tokens}
    got = ak.coded_attention(query, packed, *tables, **options)
    want = ak.coded_attention(query, ak.encode(vectors, codebook), *tables)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
