"""Attention over codes in the C++ core, alone and beside dense keys, in fp32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import astra_kernels as ak
from astra_kernels import _C
from astra_kernels._checks import CodedShape
from astra_kernels.coded_attention.native import coded_attention as native
from astra_kernels.mixed_attention.native import mixed_attention as native_mixed

ISAS = _C.attention_isas()


def table(stages, kv, groups, k, width):
    return torch.randn(stages, kv, groups, k, width)


def random_codes(b, n, kv, tables, shared):
    stages, _, groups, k, _ = tables.shape
    per_token = stages * groups * (1 if shared else kv)
    return torch.randint(0, k, (b, n, per_token), dtype=torch.int32)


def pack_rows(codes, bits):
    return torch.stack([ak.pack(row, bits) for row in codes])


def rotary(*shape):
    angle = torch.randn(*shape[:-1], shape[-1] // 2)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def in_float64(function, *args, **options):
    """The reference on doubles; codes, masks and numbers stay what they are."""

    def double(value):
        if isinstance(value, tuple):
            return tuple(double(x) for x in value)
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if is_float else value

    doubles = {name: double(value) for name, value in options.items()}
    return function(*map(double, args), **doubles, impl="reference")


def assert_near(got, want):
    for ours, exactly in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exactly.double(), rtol=6e-6, atol=6e-6)


@st.composite
def calls(draw):
    """Query, codes, two tables and options, in fp32."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    b, kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    d, groups = draw(st.sampled_from([(64, 1), (64, 4), (24, 3), (16, 8), (10, 1), (128, 2)]))
    rows, n = draw(st.sampled_from([1, 3, 20, 50])), draw(st.integers(1, 150))
    stages, k = draw(st.integers(1, 2)), draw(st.sampled_from([1, 5, 200]))
    keys = table(stages, kv, groups, k, d // groups)
    values = table(stages, kv, groups, k, draw(st.sampled_from([8, d // groups])))
    codes = random_codes(b, n, kv, keys, draw(st.booleans()))
    options = {}
    if draw(st.booleans()):
        values = table(1, kv, 1, 9, values.shape[2] * values.shape[4])
        options["value_codes"] = random_codes(b, n, kv, values, draw(st.booleans()))
    if draw(st.booleans()):
        lead = draw(st.sampled_from([(), (1,), (b,)]))
        options["rope"] = rotary(*lead, n, d)
    if draw(st.booleans()):
        options["code_mask"] = torch.rand(b, n) > 0.4
    if draw(st.booleans()):
        options["sinks"] = torch.randn(kv * group)
    return (torch.randn(b, kv * group, rows, d), codes, keys, values), options


@settings(max_examples=40, deadline=None)
@given(calls(), st.sampled_from(ISAS), st.sampled_from([None, 8, 11, 16]))
def test_any_call(call, isa, bits):
    inputs, options = call
    want = in_float64(ak.coded_attention, *inputs, **options)
    assert_near(native(*inputs, **options, isa=isa), want)
    if bits is None:
        return
    query, codes, *tables = inputs
    packed = dict(options, code_bits=bits, num_tokens=codes.shape[1])
    if "value_codes" in options:
        packed["value_codes"] = pack_rows(options["value_codes"], bits)
    got = ak.coded_attention(query, pack_rows(codes, bits), *tables, **packed, impl="native")
    assert_near(got, want)


@settings(max_examples=20, deadline=None)
@given(calls(), st.sampled_from(ISAS), st.integers(0, 70), st.booleans(), st.booleans())
def test_beside_dense_keys(call, isa, local, is_causal, masked):
    (query, codes, *tables), options = call
    batch, kv = query.shape[0], tables[0].shape[1]
    key = torch.randn(batch, kv, local, query.shape[3])
    value = torch.randn(batch, kv, local, tables[1].shape[2] * tables[1].shape[4])
    mask = torch.rand(batch, local) > 0.3 if masked else None
    options = dict(options, is_causal=is_causal, key_mask=mask)
    inputs = (query, key, value, codes, *tables)
    want = in_float64(ak.mixed_attention, *inputs, **options, return_lse=True)
    assert_near(native_mixed(*inputs, **options, isa=isa), want)


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("bits", [None, 7])
@pytest.mark.parametrize("which", ["codes", "value_codes"])
def test_codes_out_of_range(rows, bits, which):
    """Refused where they are visible, by name and place; never read where they are not."""
    query, (keys, values) = torch.randn(2, 4, rows, 16), table(2, 2, 1, 100, 16)
    both = {
        name: torch.randint(0, 100, (2, 70, 2), dtype=torch.int32)
        for name in ("codes", "value_codes")
    }
    both[which][1, 66, 1] = 100
    mask = torch.ones(2, 70, dtype=torch.bool)
    options = {"code_mask": mask, "impl": "native"}
    if bits is not None:
        both = {name: pack_rows(codes, bits) for name, codes in both.items()}
        options["code_bits"] = bits
    codes, options["value_codes"] = both["codes"], both["value_codes"]
    message = rf"{which} must be in \[0, 100\) .* got 100 at index \[1, 66, 1\]"
    with pytest.raises(ValueError, match=message):
        ak.coded_attention(query, codes, keys, values, **options)
    mask[1, 66] = False
    out, _ = ak.coded_attention(query, codes, keys, values, **options)
    assert out.isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 2**32 + 1, 2**31])
def test_negative_and_wide_codes(wrong):
    query, (keys, values) = torch.randn(1, 2, 3, 16), table(2, 1, 1, 5, 16)
    codes = torch.zeros(1, 9, 1, dtype=torch.int64)
    codes[0, 4] = wrong
    with pytest.raises(ValueError, match=r"codes must be in \[0, 5\)"):
        ak.coded_attention(query, codes, keys, values, impl="native")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", [1, 3, 6])
@pytest.mark.parametrize("bits", [None, 6])
def test_more_tokens_than_codewords(isa, group, bits):
    """Single queries sum the weights of equal values first: what no token has never matters, and
    neither does the order of scores that grow and fall by far."""
    n, k, d = 300, 40, 64
    query, (keys, values) = 3 * torch.randn(1, 2 * group, 1, d), table(2, 2, 1, k, d)
    codes = torch.randint(1, k, (1, n, 2), dtype=torch.int32)
    keys[:, 0], values[:, :, 0] = keys[:, 0] * 4, float("nan")
    mask = torch.rand(1, n) > 0.2
    codes[~mask] = 0
    options = {"rope": rotary(n, d), "code_mask": mask, "sinks": torch.randn(2 * group)}
    clean = values.nan_to_num(0.0)
    want = in_float64(ak.coded_attention, query, codes, keys, clean, **options)
    if bits is not None:
        codes = pack_rows(codes, bits)
        sizes = {"tokens": n, "key_codes": 2, "value_codes": 2}
        shape = CodedShape(**sizes, key_codewords=k, value_codewords=k)
        options |= {"code_bits": bits, "shape": shape}
    got = native(query, codes, keys, values, **options, isa=isa)
    for ours, exactly in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exactly.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_values_that_are_no_numbers(isa):
    """A visible NaN shows in its channel, whichever way values are summed."""
    query, (keys, values) = torch.randn(1, 1, 1, 32), table(2, 1, 1, 8, 32)
    values[0, 0, 3, 5] = float("nan")
    codes = torch.arange(100, dtype=torch.int32).view(1, 100, 1) % 8
    out, lse = native(query, codes, keys, values, isa=isa)
    assert out.isnan().nonzero().tolist() == [[0, 0, 0, 5]]
    assert lse.isfinite().all()


@pytest.mark.parametrize("rows", [1, 30])
def test_auto_reads_packed_codes_in_place(monkeypatch, rows):
    query, (keys, values) = torch.randn(2, 4, rows, 16), table(2, 2, 1, 100, 16)
    codes = torch.randint(0, 100, (2, 70, 2), dtype=torch.int32)
    packed = pack_rows(codes, 7)
    key, value = torch.randn(2, 2, 2, 9, 16)
    want = ak.coded_attention(query, codes, keys, values, impl="native")
    want_mixed = ak.mixed_attention(query, key, value, codes, keys, values, impl="native")
    monkeypatch.setattr("astra_kernels._library.coded.unpack_rows", None)
    options = {"code_bits": 7, "num_tokens": 70}
    got = ak.coded_attention(query, packed, keys, values, **options)
    got_mixed = ak.mixed_attention(query, key, value, packed, keys, values, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(got_mixed, want_mixed)


def test_half_precision():
    query, (keys, values) = torch.randn(1, 4, 20, 32), table(2, 2, 1, 50, 32)
    codes = torch.randint(0, 50, (1, 90, 2), dtype=torch.int32)
    halves = (query.bfloat16(), codes, keys.bfloat16(), values.bfloat16())
    out, lse = ak.coded_attention(*halves, impl="native")
    want, want_lse = in_float64(ak.coded_attention, *halves)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
    assert (lse - want_lse).abs().max() < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_are_read_as_they_are_stored(dtype, isa):
    """The same bits as from the floats that they are; by few rows and in panels, with odd halves of
    the width, hidden tokens and angles of each batch row."""
    for rows, width, batch in ((1, 64, 1), (30, 64, 2), (1, 40, 2), (30, 36, 1)):
        query, (keys, values) = torch.randn(2, 4, rows, width), table(2, 2, 2, 50, width // 2)
        codes = torch.randint(0, 50, (2, 150, 4), dtype=torch.int32)
        rope = tuple(x.to(dtype) for x in rotary(batch, 150, width))
        mask = torch.rand(2, 150) > 0.3 if rows == 1 else None
        key = torch.randn(2, 2, 9, width)
        args = (query, key, key, codes, keys, values)
        wide = tuple(x.float() for x in rope)
        got = native_mixed(*args, rope=rope, code_mask=mask, isa=isa)
        want = native_mixed(*args, rope=wide, code_mask=mask, isa=isa)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        tables = (codes, keys, values)
        got = native(query, *tables, rope=(rope[0], wide[1]), isa=isa)
        want = native(query, *tables, rope=wide, isa=isa)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_it_does_not_take():
    query, (keys, values) = torch.randn(1, 2, 3, 16), table(2, 1, 1, 5, 16)
    codes = torch.zeros(1, 9, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="its kernel does not take softcap"):
        ak.coded_attention(query, codes, keys, values, softcap=3.0, impl="native")
    with pytest.raises(RuntimeError, match="takes float32, float16 and bfloat16, not float64"):
        ak.coded_attention(query.double(), codes, keys, values, impl="native")
