"""Linear layers of integer weights against products in float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch

import astra_kernels as ak
from astra_kernels import _C
from astra_kernels.quantized_linear.reference import dequantized, rounded

# rows, inputs, outputs, groups: a few rows and many, whole tiles and ragged ones, odd widths
SHAPES = ((1, 10, 7, 1), (3, 64, 33, 2), (5, 96, 40, 3), (13, 50, 17, 1), (29, 576, 70, 18))
# groups that do not fill a step, and more weights than are laid out at a time
SHAPES += ((13, 60, 131, 2), (7, 2048, 140, 32))


def layer(inputs, outputs, groups, bits, seed=0):
    """weight, scale, minimum and bias; scales of both dtypes occur."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(outputs, groups, generator=generator) / inputs
    bias = torch.randn(outputs, generator=generator)
    if bits == 8:
        shape = (outputs, inputs)
        weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        return weight, scale, None, bias
    weight = torch.randint(0, 256, (outputs, inputs // 2), generator=generator, dtype=torch.uint8)
    minimum = torch.randn(outputs, groups, generator=generator) / inputs
    return weight, scale.bfloat16(), minimum.bfloat16(), bias


def exact(vectors, weight, scale, minimum, bias):
    integers, step = rounded(vectors, scale.shape[1])
    inputs = (integers.double() * step.double()).flatten(-2)
    return inputs @ dequantized(weight, scale, minimum).double().T + bias.double()


def run(vectors, given, isa, threads):
    weight, scale, minimum, bias = given
    out = torch.full((len(vectors), len(weight) + 1), torch.nan)[:, :-1].contiguous()
    _C.quantized_linear(
        vectors.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        0 if minimum is None else minimum.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        rows=len(vectors),
        inputs=vectors.shape[1],
        outputs=len(weight),
        groups=scale.shape[1],
        bits=8 if minimum is None else 4,
        half_scales=scale.dtype == torch.bfloat16,
        threads=threads,
        isa=isa,
    )
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("isa", _C.linear_isas())
def test_every_instruction_set_multiplies_the_same_integers(isa, bits):
    for seed, (rows, inputs, outputs, groups) in enumerate(SHAPES):
        given = layer(inputs, outputs, groups, bits, seed)
        vectors = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
        wanted = exact(vectors, *given)
        for threads in (1, 3):
            error = (run(vectors, given, isa, threads) - wanted).abs().max() / wanted.abs().max()
            assert error < 5e-7, (isa, rows, inputs, outputs, groups)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_vector_is_computed_alike_whatever_stands_beside_it(bits):
    weight, scale, minimum, bias = layer(96, 40, 3, bits)
    vectors = torch.randn(30, 96)
    whole = ak.quantized_linear(vectors, weight, scale, minimum=minimum, bias=bias)
    part = ak.quantized_linear(vectors[7:19], weight, scale, minimum=minimum, bias=bias)
    assert torch.equal(part, whole[7:19])
    one = ak.quantized_linear(vectors[7], weight, scale, minimum=minimum, bias=bias)
    torch.testing.assert_close(one, whole[7], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_native_equals_the_reference_in_every_dtype(dtype):
    weight, scale, _, bias = layer(64, 20, 2, 8)
    vectors = torch.randn(2, 3, 64).to(dtype)
    quick = ak.quantized_linear(vectors, weight, scale, bias=bias, impl="native")
    plain = ak.quantized_linear(vectors, weight, scale, bias=bias, impl="reference")
    assert quick.dtype == dtype
    assert quick.shape == (2, 3, 20)
    torch.testing.assert_close(quick, plain)


def test_what_is_not_finite_gives_nan_and_no_neighbour_notices():
    weight, scale, _, bias = layer(64, 20, 2, 8)
    vectors = torch.randn(6, 64)
    vectors[1, 3], vectors[4, 60] = torch.nan, -torch.inf
    out = ak.quantized_linear(vectors, weight, scale, bias=bias)
    assert out[[1, 4]].isnan().all()
    assert out[[0, 2, 3, 5]].isfinite().all()
    for small in (0.0, 1e-40):
        zeros = ak.quantized_linear(torch.full((1, 64), small), weight, scale, bias=bias)
        assert torch.equal(zeros[0], bias)


@pytest.mark.parametrize("bits", [8, 4])
def test_opcheck(bits):
    weight, scale, minimum, bias = layer(64, 20, 2, bits)
    arguments = (torch.randn(3, 64), weight, scale, minimum, bias, "auto")
    torch.library.opcheck(torch.ops.astra.quantized_linear.default, arguments)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"vectors": torch.zeros(2, 63)}, ValueError, r"vectors must be \[..., 64\]"),
        ({"vectors": torch.zeros(2, 64).double()}, TypeError, "vectors must be of dtype"),
        ({"weight": torch.zeros(20, 64)}, TypeError, "weight must be of dtype int8 or uint8"),
        ({"scale": torch.ones(20, 3)}, ValueError, r"scale must be \[20, G\]"),
        ({"scale": torch.ones(20, 64)}, ValueError, "even number"),
        ({"vectors": torch.zeros(2, 0), "weight": torch.zeros(20, 0).char()}, ValueError, "even"),
        ({"minimum": torch.ones(20, 2)}, ValueError, "minimum must be given with weights of 4"),
        ({"bias": torch.ones(19)}, ValueError, r"bias must be \[20\]"),
        ({"impl": "triton"}, RuntimeError, "no Triton kernel"),
    ],
)
def test_bad_input_is_refused(changes, error, match):
    weight, scale, _, bias = layer(64, 20, 2, 8)
    given = {"vectors": torch.zeros(2, 64), "weight": weight, "scale": scale, "bias": bias}
    with pytest.raises(error, match=match):
        ak.quantized_linear(**(given | changes))


def test_gradients_are_refused():
    weight, scale, _, _ = layer(64, 20, 2, 8)
    with pytest.raises(RuntimeError, match="forward-only"):
        ak.quantized_linear(torch.zeros(2, 64, requires_grad=True), weight, scale)
