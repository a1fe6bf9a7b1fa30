"""encode and encode_packed in Triton. A program costs the interpreter 7 ms, so shapes are small."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import astra_kernels as ak
from astra_kernels._triton import nearest as kernels
from astra_kernels._triton.launch import record
from astra_kernels._triton.tiles import Tile, candidates
from astra_kernels.encode import kernel
from astra_kernels.encode_packed import kernel as packed_kernel
from tests.triton_kernels.cases import examples

NAN, INF = float("nan"), float("inf")

WHOLE = Tile(32, 16, 4, 2)  # all channels in one step
STEPS = Tile(32, 16, 4, 2, 16)

# Of no score and no code: memory that a kernel has forgotten to write shows.
POISON = {torch.float32: -1e30, torch.int32: -7, torch.uint8: 171}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    new_empty = torch.Tensor.new_empty

    def poison(self, *args, **options):
        tensor = new_empty(self, *args, **options)
        return tensor.fill_(POISON.get(tensor.dtype, 0))

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


def assert_nearest(codes, vectors, codebook):
    """The float64 argmin, or a codeword that is no farther than rounding of an fp32 score hides."""
    assert codes.dtype == torch.int32
    assert codes.shape == vectors.shape[:-1]
    vectors, codebook = vectors.double(), codebook.double()
    distances = (vectors.unsqueeze(-2) - codebook).square().sum(dim=-1)
    best, code = distances.min(dim=-1)
    chosen = distances.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    size = vectors.square().sum(dim=-1) + codebook.square().sum(dim=-1).amax()
    rounding = 4 * torch.finfo(torch.float32).eps * math.sqrt(vectors.shape[-1]) * size
    assert ((codes == code) | (chosen - best <= rounding)).all()


@pytest.mark.parametrize("width", [1, 4, 16, 24, 72, 100, 200])
def test_nearest(dtype, width):
    groups = 1 if width > 24 else 3
    vectors = torch.randn(21, groups, width).to(dtype)
    codebook = torch.randn(groups, 70, width).to(dtype)
    assert_nearest(ak.encode(vectors, codebook, impl="triton"), vectors, codebook)


@pytest.mark.parametrize("width", [8, 150])
@pytest.mark.parametrize(
    ("left", "right"),
    [("bfloat16", "float32"), ("float32", "float16"), ("float16", "bfloat16")],
)
def test_mixed_dtypes_are_multiplied_as_fp32(left, right, width):
    vectors = torch.randn(20, 2, width).to(getattr(torch, left))
    codebook = torch.randn(2, 40, width).to(getattr(torch, right))
    assert_nearest(ak.encode(vectors, codebook, impl="triton"), vectors, codebook)


def test_many_groups():
    vectors, codebook = torch.randn(9, 32, 4), torch.randn(32, 17, 4)
    norms = codebook.square().sum(dim=-1) / 2
    codes = kernel.encode(vectors, codebook, norms.double(), splits=1)
    assert_nearest(codes, vectors, codebook)


@pytest.mark.parametrize("tile", [WHOLE, STEPS])
@pytest.mark.parametrize("splits", [1, 2, 4, 9])
def test_splits(splits, tile):
    """Also more splits than there are tiles of codewords."""
    vectors, codebook = torch.randn(2, 19, 1, 40), torch.randn(1, 75, 40)
    codes = kernel.encode(vectors, codebook, splits=splits, tile=tile)
    assert_nearest(codes, vectors, codebook)


@pytest.mark.parametrize("tile", [WHOLE, STEPS])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("copy", [1, 15, 16, 60])
def test_ties_go_to_the_lowest_index(splits, copy, tile):
    """The same codeword in one tile, in two, and in two splits."""
    codebook = torch.randn(1, 70, 20)
    codebook[0, copy] = codebook[0, 0]
    vectors = codebook[:, [0, copy]].mT.contiguous().mT.transpose(0, 1)
    codes = kernel.encode(vectors, codebook, splits=splits, tile=tile)
    assert codes.flatten().tolist() == [0, 0]


@examples(15)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 2), st.integers(1, 40),
    st.integers(1, 3), st.sampled_from([WHOLE, STEPS]),
)  # fmt: skip
def test_any_shape(rows, codewords, groups, width, splits, tile):
    """Small integers: scores are exact, and ties abound."""
    vectors = torch.randint(-2, 3, (rows, groups, width)).float()
    codebook = torch.randint(-2, 3, (groups, codewords, width)).half()
    codes = kernel.encode(vectors, codebook, splits=splits, tile=tile)
    assert torch.equal(codes, ak.encode(vectors, codebook, impl="reference"))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN")
@pytest.mark.parametrize("tile", [WHOLE, STEPS])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_is_not_finite(poison, splits, tile):
    """Such a vector gets code 0; such a codeword is never preferred to a finite one."""
    vectors, codebook = torch.randn(12, 1, 20), torch.randn(1, 40, 20)
    vectors[3, 0, 7] = poison
    vectors[5] = poison
    codebook[0, 0, 2] = codebook[0, 20] = codebook[0, 39, 19] = poison
    codes = kernel.encode(vectors, codebook, splits=splits, tile=tile)
    assert codes[3] == codes[5] == 0
    assert torch.equal(codes, ak.encode(vectors, codebook, impl="reference"))
    codebook[:] = poison
    assert (kernel.encode(vectors, codebook, splits=splits, tile=tile) == 0).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN")
def test_overflow_counts_as_infinitely_far():
    codebook = torch.randn(1, 20, 4)
    assert kernel.encode(torch.full((3, 1, 4), 3e38), codebook, splits=2, tile=WHOLE).sum() == 0


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_strided_vectors(groups, splits):
    """Rows and groups may be anywhere; channels that are not contiguous are copied."""
    codebook = torch.randn(groups, 20, 8)
    for vectors in (
        torch.randn(5, 3, groups + 1, 12)[:, 1:, 1:, 2:10],
        torch.randn(groups, 10, 8).transpose(0, 1),
        torch.randn(10, 8, groups).mT,
    ):
        codes = kernel.encode(vectors, codebook, splits=splits)
        assert_nearest(codes, vectors, codebook)


@pytest.mark.parametrize("bits", range(1, 17))
def test_packed_is_encode_and_pack(bits):
    """Three batch rows that end within a byte."""
    groups, tokens = (1, 13) if bits % 2 else (3, 7)
    vectors = torch.randn(3, tokens, groups, 4)
    codebook = torch.randn(groups, min(2**bits, 70), 4)
    packed = ak.encode_packed(vectors, codebook, bits, impl="triton")
    codes = ak.encode(vectors, codebook, impl="reference")
    assert torch.equal(packed, torch.stack([ak.pack(row, bits) for row in codes]))


@pytest.mark.parametrize("splits", [1, 3, 11])
def test_packed_from_splits(splits):
    """More bytes than one program makes, more splits than it reads at a time, the largest codes."""
    vectors, codebook = torch.randn(2, 110, 1, 4), torch.randn(1, 180, 4)
    codebook[0, :150] += 9
    tile = Tile(128, 16, 4, 2)
    packed = packed_kernel.encode_packed(vectors, codebook, 11, splits=splits, tile=tile)
    codes = ak.encode(vectors, codebook, impl="reference")
    assert torch.equal(packed, torch.stack([ak.pack(row, 11) for row in codes]))


def test_nothing_to_encode():
    codebook = torch.randn(3, 5, 4)
    assert ak.encode(torch.randn(0, 3, 4), codebook, impl="triton").shape == (0, 3)
    for batch, tokens in ((0, 4), (2, 0)):
        vectors = torch.randn(batch, tokens, 3, 4)
        size = (tokens * 3 * 5 + 7) // 8
        assert ak.encode_packed(vectors, codebook, 5, impl="triton").shape == (batch, size)


def test_one_codeword():
    codes = ak.encode(torch.randn(5, 2, 24), torch.randn(2, 1, 24), impl="triton")
    assert (codes == 0).all()


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 24, 128, 768, 4096])
def test_every_chip_has_a_tile(capability, kind, width):
    vectors, codebook = torch.empty(1, 1, width, dtype=kind), torch.empty(1, 9, width, dtype=kind)
    with record(capability) as launches:
        problem = kernel.problem_of(vectors, codebook)
        ak.encode(vectors, codebook, impl="triton")
    assert candidates(problem)
    assert [each.kernel for each in launches] == [kernels.half_norm, kernels.nearest]


def test_splits_fill_the_chip():
    assert kernel._even_splits(programs=16, tiles=8, slots=132) == 8
    assert kernel._even_splits(programs=1024, tiles=32, slots=396) == 1
    assert kernel._even_splits(programs=1, tiles=1, slots=132) == 1
