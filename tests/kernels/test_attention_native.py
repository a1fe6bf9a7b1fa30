"""Dense attention of the C++ core, in fp32, on every instruction set that the machine has."""

from __future__ import annotations

import exact
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

import astra_kernels as ak
from astra_kernels import _C
from astra_kernels.attention.native import attention as native
from astra_kernels.coded_attention.native import coded_attention as coded_native

INF = float("inf")
ISAS = _C.attention_isas()


def dense_inputs(b, h, kv, m, n, d, dtype=torch.float32):
    query = torch.randn(b, h, m, d, dtype=dtype)
    key, value = torch.randn(2, b, kv, n, d, dtype=dtype)
    return query, key, value


def in_float64(query, key, value, **options):
    return ak.attention(query.double(), key.double(), value.double(), **options, impl="reference")


def assert_near(got, want):
    for ours, exactly in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exactly.double(), rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "shape", [(2, 6, 3, 4, 7, 16), (1, 4, 4, 7, 7, 33), (1, 3, 1, 1, 5, 64), (2, 2, 2, 3, 3, 8)]
)
def test_as_defined_key_by_key(isa, shape):
    query, key, value = dense_inputs(*shape)
    for is_causal in (False, True):
        for mask in (None, torch.rand(key.shape[0], key.shape[2]) > 0.4):
            options = {"is_causal": is_causal, "key_mask": mask, "scale": 0.3}
            case = exact.Case(query, key, value, options=options)
            assert_near(native(query, key, value, **options, isa=isa), exact.attend(case))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_size(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    d = draw(st.sampled_from([1, 8, 24, 40, 64, 72, 80, 96, 128, 200, 256]))
    group, kv = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rows = draw(st.sampled_from([1, 2, 3, 8, 9, 31, 48, 49, 130]))
    tokens = rows + draw(st.integers(0, 200))
    query, key, value = dense_inputs(draw(st.integers(1, 2)), group * kv, kv, rows, tokens, d)
    mask = torch.rand(key.shape[0], tokens) > 0.3 if draw(st.booleans()) else None
    options = {"is_causal": draw(st.booleans()), "key_mask": mask}
    if draw(st.booleans()):
        options["sinks"] = torch.randn(group * kv)
    if draw(st.booleans()):
        value = torch.randn(*value.shape[:3], draw(st.sampled_from([4, 16, 48, 70])))
    if draw(st.booleans()):
        query = torch.randn(query.shape[0], group * kv, tokens + 5, d)
    want = in_float64(query, key, value, **options)
    assert_near(native(query, key, value, **options, isa=draw(st.sampled_from(ISAS))), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 6, 3, 200, 200, 64), (1, 6, 2, 1, 3000, 128)])
def test_error_at_most_twice_that_of_sdpa(dtype, shape):
    query, key, value = dense_inputs(*shape, dtype=dtype)
    is_causal = shape[3] > 1
    peer = sdpa(query, key, value, is_causal=is_causal, enable_gqa=True)
    want, want_lse = in_float64(query, key, value, is_causal=is_causal)
    out, lse = ak.attention(query, key, value, is_causal=is_causal, impl="native")
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32
    assert (out - want).abs().max() <= 2 * (peer - want).abs().max()
    assert (lse - want_lse).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [1, 40])
def test_any_strides(rows):
    """As projections leave them, heads on a token's row; expanded; channels apart."""
    query, key, value = (torch.randn(2, n, 16, 64).transpose(1, 2) for n in (rows, 70, 70))
    assert_near(native(query, key, value), in_float64(query, key, value))
    key, value = (x[:1].expand(2, -1, -1, -1) for x in (key, value))
    assert_near(native(query, key, value), in_float64(query, key, value))
    key, value = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (key, value))
    assert_near(native(query, key, value), in_float64(query, key, value))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("is_causal", [False, True])
def test_hidden_content_never_matters(rows, is_causal):
    query, key, value = dense_inputs(2, 4, 2, rows, 50, 32)
    mask = torch.rand(2, 50) > 0.5
    options = {"is_causal": is_causal, "key_mask": mask}
    want = native(query, key, value, **options)
    hidden = ~mask[:, None, :, None]
    poisoned = (x.masked_fill(hidden, p) for x, p in ((key, float("nan")), (value, INF)))
    for a, b in zip(native(query, *poisoned, **options), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 40])
def test_nothing_visible(rows):
    query, key, value = dense_inputs(2, 4, 2, rows, 50, 32)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1] = False
    states = (
        native(query, key, value, key_mask=mask),
        native(query, key[:, :, :0], value[:, :, :0]),
    )
    for out, lse in states:
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        assert (lse[1] == -INF).all()
    assert states[0][1][0].isfinite().all()
    out, lse = native(query[:, :, :0], key, value)
    assert out.shape == (2, 4, 0, 32)
    assert lse.shape == (2, 4, 0)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_nan_never_becomes_an_ordinary_answer(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rows, tokens = draw(st.sampled_from([1, 3, 20])), draw(st.integers(20, 90))
    query, key, value = (x.abs() + 0.1 for x in dense_inputs(2, 4, 2, rows, tokens, 16))
    row = query[0, draw(st.integers(0, 3)), draw(st.integers(0, rows - 1))]
    row[draw(st.sampled_from([slice(None), slice(3, 4)]))] = draw(
        st.sampled_from([float("nan"), -INF])
    )
    scale = draw(st.sampled_from([None, 0.7, float("nan")]))
    options = {"is_causal": draw(st.booleans()), "scale": scale}
    want = ak.attention(query, key, value, **options, impl="reference")
    got = ak.attention(query, key, value, **options, impl="native")
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_any_number_of_threads_gives_the_same_bits():
    query, key, value = dense_inputs(1, 6, 3, 300, 500, 64)
    states = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            states.append(native(query, key, value, is_causal=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_what_it_does_not_take():
    query, key, value = dense_inputs(1, 2, 2, 3, 4, 8, torch.float64)
    with pytest.raises(RuntimeError, match="impl='native' cannot run: the C\\+\\+ kernel takes"):
        ak.attention(query, key, value, impl="native")
    query, key, value = dense_inputs(1, 2, 2, 3, 4, 8)
    options = {"window": (1, 0), "softcap": 5.0, "attn_mask": torch.zeros(3, 4)}
    for name, option in options.items():
        with pytest.raises(RuntimeError, match=f"its kernel does not take {name}"):
            ak.attention(query, key, value, **{name: option}, impl="native")


def test_gradients_are_those_of_the_reference():
    """Forward in C++, backward by the op's own gradient."""
    inputs = [x.requires_grad_() for x in dense_inputs(1, 4, 2, 9, 20, 16)]
    gradients = []
    for impl in ("native", "reference"):
        out, lse = ak.attention(*inputs, is_causal=True, impl=impl)
        gradients.append(torch.autograd.grad(out.square().sum() + lse.sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_as_it_is(dtype, isa):
    """The softmax over one key is 1: out is the value, by few rows and in panels."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    value = bits.view(dtype).view(1, 256, 1, 256)
    for heads, rows in ((256, 1), (256, 9)):
        query, key = torch.zeros(1, heads, rows, 33, dtype=dtype), torch.zeros(1, 256, 1, 33)
        out, _ = native(query, key.to(dtype), value, isa=isa)
        want = value.expand(1, 256, rows, 256)
        assert torch.equal(out.isnan(), want.isnan())
        # -0 comes out of a sum of products as 0.
        assert torch.equal(out.nan_to_num(), want.nan_to_num() + 0.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_to_the_nearest(dtype, isa):
    """Values of a table in fp32, codes one to one, against torch's rounding."""
    halves = torch.arange(0, 2**15, 7, dtype=torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()]
    ties = (halves[1:] + halves[:-1]) / 2
    edges = torch.tensor([65519.9, 65520.0, 3e38, INF])
    near = torch.cat((edges, ties, ties * (1 + 2**-20), ties * (1 - 2**-20)))
    near = torch.stack((near, -near), dim=1).flatten()
    width = 37
    near = near[: len(near) // width * width]
    values = near.view(1, 1, -1, width)
    tokens = values.shape[2]
    codes = torch.arange(tokens, dtype=torch.int32).view(tokens, 1, 1)
    query = torch.zeros(tokens, 1, 1, 8, dtype=dtype)
    tables = (torch.zeros(1, 1, tokens, 8), values)
    out, _ = coded_native(query, codes, *tables, isa=isa)
    assert torch.equal(out.flatten(), near.to(dtype))
