from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import astra_kernels as ak

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("k", [1, 2, 37, 64, 128, 192])
def test_float64_nearest(impl, lead, k):
    vectors = torch.randn(*lead, 3, 8, dtype=torch.float64)
    codebook = torch.randn(3, k, 8, dtype=torch.float64)
    codes = ak.encode(vectors, codebook, impl=impl)
    assert codes.dtype == torch.int32
    assert codes.shape == (*lead, 3)
    distances = (vectors.unsqueeze(-2) - codebook).square().sum(dim=-1)
    assert torch.equal(codes.long(), distances.argmin(dim=-1))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**20))
def test_ties_go_to_the_lowest_index(k, groups, width, seed):
    """Small integers: distances are exact in fp32 on every path, and ties abound."""
    torch.manual_seed(seed)
    vectors = torch.randint(-2, 3, (20, groups, width)).float()
    codebook = torch.randint(-2, 3, (groups, k, width)).float()
    want = ak.encode(vectors, codebook, impl="reference")
    assert torch.equal(ak.encode(vectors, codebook), want)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 140), st.integers(0, 2**20))
def test_the_native_loop_equals_the_reference(k, groups, width, seed):
    """Exact sums again; the dispatch takes it up to some width only, it is right at any."""
    torch.manual_seed(seed)
    vectors = torch.randint(-2, 3, (29, groups, width)).float()
    codebook = torch.randint(-2, 3, (groups, k, width)).float()
    want = ak.encode(vectors, codebook, impl="reference")
    assert torch.equal(ak.encode(vectors, codebook, impl="native"), want)


@pytest.mark.parametrize("threads", [1, 3])
def test_native_threads_and_strides(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        vectors, codebook = torch.randn(3, 8, 700).transpose(0, 2), torch.randn(8, 256, 3)
        codes = ak.encode(vectors, codebook, impl="native")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(codes, ak.encode(vectors, codebook, impl="reference"))


def test_native_takes_no_float64():
    with pytest.raises(RuntimeError, match="impl='native' cannot run: the C\\+\\+ kernel takes"):
        ak.encode(torch.randn(2, 1, 4).double(), torch.randn(1, 8, 4), impl="native")


def test_many_tiles(monkeypatch):
    from astra_kernels.encode import cpu

    vectors, codebook = torch.randn(50, 2, 8).double(), torch.randn(2, 128, 8).double()
    want = ak.encode(vectors, codebook)
    monkeypatch.setattr(cpu, "TILE", 0)
    monkeypatch.setattr(cpu, "MIN_ROWS", 7)
    assert torch.equal(ak.encode(vectors, codebook), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chosen_distance_is_minimal_to_rounding(dtype):
    vectors, codebook = torch.randn(60, 2, 64).to(dtype), torch.randn(2, 256, 64).to(dtype)
    codes = ak.encode(vectors, codebook).long().unsqueeze(-1)
    distances = (vectors.double().unsqueeze(-2) - codebook.double()).square().sum(dim=-1)
    chosen, least = distances.gather(-1, codes).squeeze(-1), distances.amin(dim=-1)
    assert (chosen - least <= 64 * torch.finfo(torch.float32).eps * distances.amax()).all()
    assert torch.equal(codes.squeeze(-1), ak.encode(vectors, codebook, impl="reference").long())


def test_half_norms(impl):
    vectors, codebook = torch.randn(40, 2, 8).double(), torch.randn(2, 64, 8).double()
    norms = codebook.square().sum(dim=-1) / 2
    got = ak.encode(vectors, codebook, half_norms=norms, impl=impl)
    assert torch.equal(got, ak.encode(vectors, codebook, impl=impl))


@pytest.mark.parametrize("k", [7, 128])
def test_not_a_number(impl, k):
    vectors, codebook = torch.randn(6, 2, 4), torch.randn(2, k, 4)
    clean = ak.encode(vectors, codebook, impl=impl)
    vectors[1, 0, 2] = NAN
    vectors[2, 1, 0] = INF
    vectors[3, 1] = -INF
    codes = ak.encode(vectors, codebook, impl=impl)
    assert codes[1, 0] == 0
    assert codes[2, 1] == 0
    assert codes[3, 1] == 0
    clean[1, 0] = clean[2, 1] = clean[3, 1] = 0
    assert torch.equal(codes, clean)


@pytest.mark.parametrize("poison", [NAN, INF])
def test_codeword_that_is_not_a_number_is_never_preferred(impl, poison):
    vectors, codebook = torch.randn(50, 1, 4), torch.randn(1, 9, 4)
    codebook[0, 0] = poison
    codes = ak.encode(vectors, codebook, impl=impl)
    want = ak.encode(vectors, codebook[:, 1:], impl=impl) + 1
    assert torch.equal(codes, want)


def test_nan_is_no_farther_than_infinity(impl):
    """All distances from an infinite vector are infinite, or NaN, which counts as infinite."""
    vectors, codebook = torch.full((1, 1, 4), INF), torch.randn(1, 7, 4)
    codebook[0, 0, 1] = INF
    assert ak.encode(vectors, codebook, impl=impl) == 0


def test_most_codewords():
    codebook = torch.randn(1, 65536, 2)
    vectors = codebook[0, [65535, 0, 40000]].unsqueeze(1)
    assert ak.encode(vectors, codebook).flatten().tolist() == [65535, 0, 40000]


def test_no_vectors(impl):
    codes = ak.encode(torch.randn(0, 3, 4), torch.randn(3, 5, 4), impl=impl)
    assert codes.shape == (0, 3)
    assert codes.dtype == torch.int32


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("groups", "width"), [(3, 0), (0, 4)])
def test_no_channels_and_no_groups(impl, groups, width):
    """Of no channels all codewords are equal."""
    table = torch.zeros(groups, 5, width)
    codes = ak.encode(torch.zeros(2, groups, width), table, impl=impl)
    assert torch.equal(codes, torch.zeros(2, groups, dtype=torch.int32))
    assert ak.decode(codes, table).shape == (2, groups, width)


def test_strided_vectors():
    vectors = torch.randn(3, 8, 20).permute(2, 0, 1)
    codebook = torch.randn(3, 8, 64).transpose(1, 2)
    want = ak.encode(vectors.contiguous(), codebook.contiguous())
    assert torch.equal(ak.encode(vectors, codebook), want)


@pytest.mark.parametrize("width", [24, 128])
@pytest.mark.parametrize("given", [False, True])
def test_of_equal_codewords_the_lowest(impl, width, given):
    """However many vectors are encoded at once."""
    table = torch.randn(2, 40, width)
    twins = ([3, 39, 11], [0, 17, 38])
    for group, (lowest, *others) in enumerate(map(sorted, twins)):
        table[group, others] = table[group, lowest].clone()
    want = torch.tensor([3, 0], dtype=torch.int32)
    x = torch.stack([table[0, 3], table[1, 0]]) + 0.1 * torch.randn(30, 2, width)
    half_norms = table.square().sum(-1) / 2 if given else None
    assert ak.encode(x, table, half_norms=half_norms, impl=impl).eq(want).all()
    for row in x:
        assert ak.encode(row, table, half_norms=half_norms, impl=impl).eq(want).all()
