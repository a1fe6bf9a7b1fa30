from __future__ import annotations

import pytest
import torch

import astra_kernels as ak


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (0,), (4,), (2, 3)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_exact(impl, dtype, lead, index):
    codebook = torch.randn(3, 5, 8).to(dtype)
    codes = torch.randint(0, 5, (*lead, 3), dtype=index)
    vectors = ak.decode(codes, codebook, impl=impl)
    assert vectors.dtype == dtype
    assert vectors.shape == (*lead, 3, 8)
    flat = zip(codes.view(-1, 3), vectors.view(-1, 3, 8), strict=True)
    for row, vector in flat:
        for group in range(3):
            assert torch.equal(vector[group], codebook[group, row[group]])


def test_strided(impl):
    codebook = torch.randn(5, 3, 8).transpose(0, 1)
    codes = torch.randint(0, 5, (3, 7), dtype=torch.int32).t()
    want = ak.decode(codes.contiguous(), codebook.contiguous(), impl=impl)
    assert torch.equal(ak.decode(codes, codebook, impl=impl), want)


def test_encode_gives_codewords_back(impl):
    codebook = torch.randn(3, 50, 8)
    codes = torch.randint(0, 50, (20, 3), dtype=torch.int32)
    assert torch.equal(ak.encode(ak.decode(codes, codebook), codebook, impl=impl), codes)
