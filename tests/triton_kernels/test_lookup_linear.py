"""The linear layer over looked-up hidden states: every shape ragged, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import astra_kernels as ak
from astra_kernels._triton import tiles
from astra_kernels.lookup_linear import kernel
from astra_kernels.lookup_linear.kernel import lookup_linear
from astra_kernels.lookup_linear.reference import look_up
from tests.triton_kernels.cases import examples

NORMS = [None, "rms", "layer"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the launcher takes holds NaN."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        fresh = plain(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def make(tokens=19, groups=3, width=24, stages=1, outputs=37, codewords=11, dtype=torch.float32):
    """codes, codebook, weight, bias, estimate"""
    channels = groups * width
    codes = torch.randint(0, codewords, (tokens, stages * groups), dtype=torch.int32)
    codebook = torch.randn(stages, groups, codewords, width).to(dtype)
    weight = (torch.randn(outputs, channels) / channels**0.5).to(dtype)
    bias, estimate = torch.randn(outputs).to(dtype), torch.randn(tokens, channels).to(dtype)
    return codes, codebook, weight, bias, estimate


def plain(codes, codebook, weight, bias, estimate, norm, eps=1e-6):
    """y and x by torch's own functions, all in the dtype that the tensors have."""
    x = look_up(codes, codebook)
    if estimate is not None:
        x = (estimate + x).to(estimate.dtype)
    normed = x.to(weight.dtype)
    if norm == "rms":
        normed = F.rms_norm(normed, x.shape[-1:], eps=eps)
    if norm == "layer":
        normed = F.layer_norm(normed, x.shape[-1:], eps=eps)
    return F.linear(normed, weight, bias), x


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def assert_as_exact_as_torch(case, norm, slack=1.0, **options):
    """Error at most twice that of torch in the same dtype."""
    codes, codebook, weight, bias, estimate = case
    y, x = lookup_linear(codes, codebook, weight, bias, estimate=estimate, norm=norm, **options)
    want, want_x = plain(*double(*case), norm)
    peer, peer_x = plain(*case, norm)
    if weight.device.type == "cuda":  # whose sums, in another order, may be as exact as they get
        slack *= 4
    eps = slack * torch.finfo(weight.dtype).eps
    assert y.dtype == weight.dtype
    assert y.shape == want.shape
    assert x is None or x.dtype == estimate.dtype
    pairs = [(y, want, peer)] if x is None else [(y, want, peer), (x, want_x, peer_x)]
    for got, exact, others in pairs:
        assert (got - exact).abs().max() <= 2 * (others - exact).abs().max() + eps


@pytest.mark.parametrize(
    ("norm", "known"), [(None, False), ("rms", True), ("layer", False), ("layer", True)]
)
@pytest.mark.parametrize(("groups", "width"), [(3, 24), (1, 72), (7, 3)])
@pytest.mark.parametrize("library", [False, True])
def test_groups(dtype, norm, known, groups, width, library):
    *case, estimate = make(groups=groups, width=width, dtype=dtype)
    assert_as_exact_as_torch([*case, estimate if known else None], norm, library=library)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("library", [False, True])
def test_additive_stages(dtype, stages, norm, library):
    assert_as_exact_as_torch(make(stages=stages, dtype=dtype), norm, library=library)


@pytest.mark.parametrize("tile", [*kernel._TILES_OF_2_BYTES, kernel._LAST_RESORT], ids=str)
def test_tiles(monkeypatch, tile):
    """More than one tile each way, the second one ragged."""
    case = make(tile.rows + 3, outputs=tile.columns + 5, width=8, dtype=torch.float16)
    monkeypatch.setattr(kernel, "choose", lambda _: tile)
    assert_as_exact_as_torch(case, "layer")


@pytest.mark.parametrize("grouped", [1, 2, 3])
def test_order_of_tiles(monkeypatch, grouped):
    """Every tile is worked on once, whatever the number in a group."""
    monkeypatch.setattr(kernel, "GROUPED", grouped)
    monkeypatch.setattr(kernel, "choose", lambda _: tiles.Tile(16, 16, 4, 3, 16))
    assert_as_exact_as_torch(make(tokens=50, outputs=75, width=8), "rms")


@examples(15)
@given(
    tokens=st.integers(1, 40),
    groups=st.integers(1, 6),
    width=st.integers(1, 30),
    stages=st.integers(1, 2),
    outputs=st.integers(1, 70),
    codewords=st.integers(1, 20),
    norm=st.sampled_from(NORMS),
    known=st.booleans(),
)
def test_any_shape(tokens, groups, width, stages, outputs, codewords, norm, known):
    *case, estimate = make(tokens, groups, width, stages, outputs, codewords)
    # The norm divides by the deviation, next to nothing in a row of few channels.
    assert_as_exact_as_torch([*case, estimate if known else None], norm, slack=32)


@pytest.mark.parametrize(("bits", "stages"), [(1, 1), (3, 2), (8, 1), (11, 2), (16, 1)])
def test_packed_codes(device, bits, stages):
    batch, tokens = 3, 7
    case = make(batch * tokens, width=8, stages=stages, codewords=min(11, 1 << bits))
    codes, codebook, weight, bias, estimate = case
    rows = codes.view(batch, tokens, -1)
    packed = torch.stack([ak.pack(row.cpu(), bits) for row in rows]).to(device)
    options = {"estimate": estimate.view(batch, tokens, -1), "norm": "rms"}
    want = lookup_linear(rows, codebook, weight, bias, **options)
    sizes = {"code_bits": bits, "num_tokens": tokens}
    for library in (False, True):
        got = lookup_linear(packed, codebook, weight, bias, **options, **sizes, library=library)
        # Compiled, the two may be laid out differently for the matrix unit, and add in another
        # order.
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("library", [False, True])
def test_few_tokens(norm, tokens, library):
    codes, codebook, weight, bias, estimate = make(tokens)
    how = {"norm": norm, "library": library}
    y, x = lookup_linear(codes, codebook, weight, bias, estimate=estimate, **how)
    assert (y.shape, x.shape) == ((tokens, 37), (tokens, 72))
    if tokens:
        assert_as_exact_as_torch((codes, codebook, weight, bias, estimate), **how)


@pytest.mark.parametrize("library", [False, True])
def test_no_outputs(library):
    codes, codebook, weight, bias, estimate = make(outputs=0)
    assert lookup_linear(codes, codebook, weight, bias, library=library)[0].shape == (19, 0)
    how = {"estimate": estimate, "norm": "layer", "library": library}
    y, x = lookup_linear(codes, codebook, weight, bias, **how)
    assert y.shape == (19, 0)
    torch.testing.assert_close(x, plain(codes, codebook, weight, bias, estimate, None)[1])


@pytest.mark.parametrize("mean", [30.0, 1000.0])
@pytest.mark.parametrize("known", [torch.float32, torch.float16], ids=str)
def test_large_mean(dtype, mean, known):
    """Layer norm of rows whose mean is many times their deviation loses no digits to it."""
    codes, codebook, weight, bias, estimate = make(groups=8, dtype=dtype)
    estimate = (estimate.float() + mean).to(known)
    y, x = lookup_linear(codes, codebook, weight, bias, estimate=estimate, norm="layer")
    normed = F.layer_norm(x.double(), x.shape[-1:], eps=1e-6)
    want = F.linear(normed, weight.double(), bias.double())
    # Torch's norm in fp32, of the same x, and its product in the dtype.
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(dtype)
    peer = F.linear(normed, weight, bias)
    eps = torch.finfo(dtype).eps
    assert (y - want).abs().max() <= 2 * (peer - want).abs().max() + eps


def test_massive_channel_where_the_mean_is_sampled():
    """The sample that is subtracted is off by deviations, and no digits are lost to it either."""
    codes, codebook, weight, bias, estimate = make(groups=32)
    estimate[:, 5] = 3000.0
    assert_as_exact_as_torch((codes, codebook, weight, bias, estimate), "layer")


def test_mixed_dtypes():
    codes, codebook, weight, bias, estimate = make()
    y, x = lookup_linear(codes, codebook.half(), weight.half(), bias, estimate=estimate, norm="rms")
    assert (y.dtype, x.dtype) == (torch.float16, torch.float32)
    want, want_x = plain(codes, *double(codebook.half(), weight.half(), bias, estimate), "rms")
    assert (x - want_x).abs().max() <= 1e-5
    assert (y - want).abs().max() <= 1e-2


def test_codes_out_of_range_read_the_last_codeword():
    codes, *rest = make()[:4]
    wild = codes.clone()
    wild[3, 1], wild[4, 2] = 1 << 30, -5
    codes[3, 1] = codes[4, 2] = 10
    assert torch.equal(lookup_linear(wild, *rest)[0], lookup_linear(codes, *rest)[0])


def test_long_codes():
    codes, *rest = make()[:4]
    assert torch.equal(lookup_linear(codes.long(), *rest)[0], lookup_linear(codes, *rest)[0])


def test_through_the_public_function(device):
    codes, codebook, weight, bias, estimate = make(width=8)
    options = {"estimate": estimate, "norm": "rms"}
    got = ak.lookup_linear(codes, codebook, weight, bias, **options, impl="triton")
    want = ak.lookup_linear(codes, codebook, weight, bias, **options, impl="reference")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    packed = ak.pack(codes.cpu(), 5)[None].to(device)
    options = {"code_bits": 5, "num_tokens": len(codes), "impl": "triton"}
    y = ak.lookup_linear(packed, codebook, weight, bias, **options)
    want = ak.lookup_linear(codes, codebook, weight, bias, impl="triton")
    torch.testing.assert_close(y[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("estimate_itemsize", [0, 2, 4])
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
@pytest.mark.parametrize(("stages", "packed"), [(1, False), (4, True)])
def test_a_tile_fits(itemsize, estimate_itemsize, capability, stages, packed):
    """On any chip, also with tables of twice the weight's size; the more tokens, the larger."""
    sizes = []
    for tokens in (1, 64, 1 << 14):
        problem = kernel.LookupLinear(
            capability, itemsize, 4, estimate_itemsize, stages, packed, True, 8, tokens, 2048, 132
        )
        tile = tiles.choose(problem)
        sizes.append(tile.rows * tile.columns)
    assert sizes == sorted(sizes)
