"""A linear layer over looked-up hidden states, beside the same in float64, token by token."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import astra_kernels as ak
from astra_kernels.lookup_linear import reference

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def make(lead=(7,), groups=3, codewords=5, width=8, stages=None, outputs=11, dtype=torch.float32):
    """codes, codebook, weight, bias"""
    shape = (groups, codewords, width)
    codebook = torch.randn(shape if stages is None else (stages, *shape)).to(dtype)
    codes = torch.randint(0, codewords, (*lead, (stages or 1) * groups), dtype=torch.int32)
    weight = torch.randn(outputs, groups * width).to(dtype)
    return codes, codebook, weight, torch.randn(outputs).to(dtype)


def exact(codes, codebook, weight, bias=None, *, estimate=None, norm=None, eps=1e-6):
    """y and x in float64, one token after the other, by numpy."""
    tables = codebook.double().numpy()
    tables = tables if tables.ndim == 4 else tables[None]
    stages, groups = tables.shape[:2]
    rows = codes.reshape(-1, stages, groups).numpy()
    start = np.zeros((len(rows), weight.shape[1]))
    if estimate is not None:
        start = estimate.double().reshape(start.shape).numpy()
    xs, ys = [], []
    for row, known in zip(rows, start, strict=True):
        x = known.copy()
        for stage in range(stages):
            parts = [tables[stage, group, row[stage, group]] for group in range(groups)]
            x += np.concatenate(parts)
        xs.append(x)
        mean = x.mean() if norm == "layer" else 0.0
        root = np.sqrt(((x - mean) ** 2).mean() + eps) if norm else 1.0
        y = weight.double().numpy() @ ((x - mean) / root)
        ys.append(y if bias is None else y + bias.double().numpy())
    lead = codes.shape[:-1]
    x, y = (torch.from_numpy(np.array(z)) for z in (xs, ys))
    return y.reshape(*lead, -1), x.reshape(*lead, -1)


def close(got, want, dtype):
    """Within rounding of sums of some 24 products of normal numbers in ``dtype``."""
    bound = 32 * torch.finfo(dtype).eps * (1 + want.abs().max())
    assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("stages", [None, 1, 3])
def test_projection(impl, dtype, norm, stages):
    codes, codebook, weight, bias = make((2, 5), stages=stages, dtype=dtype)
    bias = None if stages == 1 else bias
    y = ak.lookup_linear(codes, codebook, weight, bias, norm=norm, impl=impl)
    assert (y.shape, y.dtype) == ((2, 5, 11), dtype)
    close(y, exact(codes, codebook, weight, bias, norm=norm)[0], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("known", FLOATS)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_estimate_is_refined(impl, dtype, known, norm):
    codes, codebook, weight, bias = make((2, 5), stages=2, dtype=dtype)
    estimate = torch.randn(2, 5, 24).to(known)
    before = estimate.clone()
    y, x = ak.lookup_linear(codes, codebook, weight, bias, estimate=estimate, norm=norm, impl=impl)
    assert torch.equal(estimate, before)
    assert (y.shape, y.dtype, x.shape, x.dtype) == ((2, 5, 11), dtype, (2, 5, 24), known)
    _, want_x = exact(codes, codebook, weight, estimate=estimate)
    assert (x.double() - want_x).abs().max() <= torch.finfo(known).eps * want_x.abs().max() + 1e-6
    # y is that of x as it was returned.
    nothing = torch.zeros_like(codebook)
    want_y, _ = exact(codes, nothing, weight, bias, estimate=x, norm=norm)
    close(y, want_y, dtype)


def test_depth(impl):
    """Blocks refine one estimate, which stays the sum of the first and all looked-up vectors."""
    start = torch.randn(6, 24, dtype=torch.float64)
    estimate, total = start, start.clone()
    for _ in range(4):
        codes, codebook, weight, _ = make((6,), dtype=torch.float64)
        total += ak.decode(codes, codebook).flatten(1)
        y, estimate = ak.lookup_linear(codes, codebook, weight, estimate=estimate, impl=impl)
        torch.testing.assert_close(y, total @ weight.T)
    torch.testing.assert_close(estimate, total)


@pytest.mark.parametrize("bits", [1, 3, 8, 11, 16])
@pytest.mark.parametrize("stages", [None, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_packed_codes(impl, bits, stages, batch):
    codes, *rest = make((batch, 5), codewords=2, stages=stages)
    packed = torch.stack([ak.pack(row, bits) for row in codes])
    want = ak.lookup_linear(codes, *rest, norm="rms", impl=impl)
    options = {"norm": "rms", "impl": impl, "code_bits": bits, "num_tokens": 5}
    assert torch.equal(ak.lookup_linear(packed, *rest, **options), want)


def test_number_of_packed_tokens_is_found(impl):
    codes, *rest = make((2, 5))
    packed = torch.stack([ak.pack(row, 4) for row in codes])  # 12 bits a token, 7.5 bytes a row
    want = ak.lookup_linear(codes, *rest, impl=impl)
    assert torch.equal(ak.lookup_linear(packed, *rest, code_bits=4, impl=impl), want)
    estimate = torch.zeros(2, 5, 24)
    y, _ = ak.lookup_linear(packed, *rest, code_bits=4, estimate=estimate, impl=impl)
    assert torch.equal(y, want)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (1,), (2, 3, 4)])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_any_leading_axes(impl, lead, norm):
    codes, *rest = make(lead)
    y = ak.lookup_linear(codes, *rest, norm=norm, impl=impl)
    assert y.shape == (*lead, 11)
    if y.numel():
        close(y, exact(codes.view(-1, 3), *rest, norm=norm)[0].view(y.shape), torch.float32)


def test_strided_inputs(impl):
    codes, codebook, weight, bias = make((4, 6))
    estimate = torch.randn(6, 4, 24).transpose(0, 1)
    want = ak.lookup_linear(codes, codebook, weight, bias, estimate=estimate.contiguous())
    got = ak.lookup_linear(
        codes.mT.contiguous().mT,
        codebook.mT.contiguous().mT,
        weight.T.contiguous().T,
        bias.repeat_interleave(2)[::2],
        estimate=estimate,
        impl=impl,
    )
    for a, b in zip(got, want, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_folded_norm(norm, with_bias):
    codes, codebook, weight, bias = make((9,), dtype=torch.float64)
    bias = bias if with_bias else None
    gain, shift = torch.randn(2, 24, dtype=torch.float64)
    shift = shift if norm == "layer" else None
    x = ak.decode(codes, codebook).flatten(1)
    if norm == "layer":
        normed = torch.nn.functional.layer_norm(x, (24,), gain, shift, 1e-6)
    else:
        normed = torch.nn.functional.rms_norm(x, (24,), gain, 1e-6)
    folded = ak.fold_norm(weight, bias, gain, shift)
    want = torch.nn.functional.linear(normed, weight, bias)
    torch.testing.assert_close(ak.lookup_linear(codes, codebook, *folded, norm=norm), want)
    assert (folded[1] is None) == (not with_bias and shift is None)


def test_folding_keeps_dtype_and_checks_shapes():
    weight, bias, gain, shift = (torch.randn(s).half() for s in ((3, 4), (3,), (4,), (4,)))
    assert [x.dtype for x in ak.fold_norm(weight, bias, gain.float(), shift)] == [torch.half] * 2
    with pytest.raises(ValueError, match=re.escape("fold_norm: gain must be [4] (D of weight)")):
        ak.fold_norm(weight, bias, bias)
    with pytest.raises(ValueError, match=re.escape("fold_norm: shift must be [4] (D of weight)")):
        ak.fold_norm(weight, bias, gain, bias)
    with pytest.raises(ValueError, match=re.escape("fold_norm: bias must be [3] (out of weight)")):
        ak.fold_norm(weight, gain, gain)
    with pytest.raises(ValueError, match=re.escape("fold_norm: weight must be [out, D]")):
        ak.fold_norm(gain, bias, gain)
    with pytest.raises(TypeError, match=re.escape("fold_norm: gain must be a torch.Tensor")):
        ak.fold_norm(weight, bias, None)
    with pytest.raises(TypeError, match=re.escape("fold_norm: shift must be of dtype float32")):
        ak.fold_norm(weight, bias, gain, torch.ones(4, dtype=torch.int32))


def test_reference_is_differentiable():
    sizes = {"groups": 2, "codewords": 3, "width": 3, "stages": 2, "outputs": 2}
    codes, codebook, weight, bias = make((2,), **sizes, dtype=torch.float64)
    estimate = torch.randn(2, 6, dtype=torch.float64)

    def both(codebook, weight, bias, estimate):
        return reference.lookup_linear(
            codes, codebook, weight, bias, estimate=estimate, norm="layer"
        )

    tensors = [x.requires_grad_() for x in (codebook, weight, bias, estimate)]
    assert torch.autograd.gradcheck(both, tensors, fast_mode=True)


def test_codes_out_of_range_are_refused(impl):
    codes, *rest = make((4,))
    codes[2, 1] = 5
    with pytest.raises(ValueError, match=re.escape("codes must be in [0, 5) (K codewords), got 5")):
        ak.lookup_linear(codes, *rest, impl=impl)
    packed = ak.pack(codes, 3)[None]
    with pytest.raises(ValueError, match=re.escape("got 5 at index [0, 2, 1]")):
        ak.lookup_linear(packed, *rest, code_bits=3, num_tokens=4, impl=impl)


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("bias", torch.ones(24), ValueError, "bias must be [11] (out of weight), got shape [24]"),
        ("bias", 1.0, TypeError, "bias must be a torch.Tensor or None, got float"),
        ("bias", torch.ones(11).int(), TypeError, "bias must be of dtype float32"),
        ("estimate", torch.ones(7, 23), ValueError, "estimate must be [7, 24]"),
        ("estimate", torch.ones(7, 24).int(), TypeError, "estimate must be of dtype float32"),
        ("estimate", torch.ones(7, 24, device="meta"), ValueError, "estimate must be on cpu"),
        ("norm", "batch", ValueError, "norm must be None, 'rms' or 'layer', got 'batch'"),
        ("num_tokens", 7, ValueError, "num_tokens must be left out when codes are not packed"),
        ("code_bits", 3, TypeError, "codes must be of dtype uint8, got int32"),
    ],
)
def test_bad_options_are_named(impl, option, value, error, message):
    codes, codebook, weight, _ = make((7,))
    with pytest.raises(error, match=f"astra_kernels.lookup_linear: {re.escape(message)}"):
        ak.lookup_linear(codes, codebook, weight, **{option: value}, impl=impl)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 7), {"code_bits": 3, "num_tokens": 7}, "codes must be [B, ceil(N*3*3/8)] with N = 7"),
        ((7,), {"code_bits": 3}, "codes must be [B, bytes]"),
        ((1, 7), {"code_bits": 17}, "code_bits must be from 1 to 16, got 17"),
        ((1, 7), {"code_bits": 2}, "num_tokens must be given when a token takes fewer than 8 bits"),
    ],
)
def test_packed_sizes_that_do_not_fit(shape, options, message):
    _, codebook, weight, _ = make()
    packed = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match=re.escape(message)):
        ak.lookup_linear(packed, codebook, weight, **options)
