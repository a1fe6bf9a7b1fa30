"""Codes back to vectors in Triton: exact copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import astra_kernels as ak
from astra_kernels.decode import kernel, reference
from tests.triton_kernels.cases import examples

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def decode(codes, codebook, **options):
    return ak.decode(codes, codebook, impl="triton", **options)


@pytest.mark.parametrize(
    ("index", "kind"), [*((torch.int32, kind) for kind in DTYPES), (torch.int64, torch.float16)]
)
@pytest.mark.parametrize("width", [1, 3, 24, 768])
def test_exact(kind, index, width):
    codebook = torch.randn(3, 5, width).to(kind)
    codes = torch.randint(0, 5, (2, 7, 3), dtype=index)
    vectors = kernel.decode(codes, codebook)
    assert vectors.dtype == kind
    assert vectors.is_contiguous()
    assert torch.equal(vectors, reference.decode(codes, codebook))


def test_what_is_no_number_is_copied():
    codebook = torch.tensor([[[float("nan"), float("inf")], [-0.0, 1e-45]]])
    codes = torch.tensor([[0], [1]], dtype=torch.int32)
    got = decode(codes, codebook)
    assert torch.equal(got.view(torch.int32), codebook.view(torch.int32)[0, :, None])


@examples(40)
@given(
    lead=st.lists(st.integers(0, 40), max_size=2),
    groups=st.integers(0, 5),
    codewords=st.integers(1, 40),
    width=st.integers(0, 40),
)
def test_any_shape(lead, groups, codewords, width):
    codebook = torch.randn(groups, codewords, width)
    codes = torch.randint(0, codewords, (*lead, groups), dtype=torch.int32)
    got = decode(codes, codebook)
    assert got.shape == (*lead, groups, width)
    if groups:
        assert torch.equal(got, reference.decode(codes, codebook))


@pytest.mark.parametrize("codewords", [1, 65536])
def test_fewest_and_most_codewords(codewords):
    codebook = torch.randn(2, codewords, 4)
    codes = torch.tensor([[0, codewords - 1], [codewords - 1, codewords // 2]], dtype=torch.int32)
    assert torch.equal(decode(codes, codebook), reference.decode(codes, codebook))


def test_strided():
    codebook = torch.randn(5, 3, 8).transpose(0, 1)
    codes = torch.randint(0, 5, (3, 7), dtype=torch.int32).t()
    assert torch.equal(decode(codes, codebook), reference.decode(codes, codebook))


def test_codes_out_of_range():
    codebook = torch.randn(1, 5, 4)
    codes = torch.tensor([[5], [-1], [2]], dtype=torch.int32)
    with pytest.raises(ValueError, match="codes must be in"):
        decode(codes, codebook, check=True)
    got = decode(codes, codebook, check=False)
    assert torch.equal(got[:, 0], codebook[0, [4, 4, 2]])
