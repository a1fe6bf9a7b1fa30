from __future__ import annotations

import exact
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

import astra_kernels as ak
from astra_kernels._rotary import apply_rope
from astra_kernels.coded_attention import reference

INF = float("inf")


def coded(
    b=2, h=6, kv=3, m=3, n=7, d=16, k=5, groups=1, stages=None, shared=False, dtype=torch.float64
):
    lead = () if stages is None else (stages,)
    tables = [torch.randn(*lead, kv, groups, k, d // groups, dtype=dtype) for _ in range(2)]
    count = (stages or 1) * groups * (1 if shared else kv)
    codes = torch.randint(0, k, (b, n, count), dtype=torch.int32)
    return torch.randn(b, h, m, d, dtype=dtype), codes, *tables


def make_rope(*shape, dtype=torch.float64):
    angle = torch.randn(*shape[:-1], shape[-1] // 2, dtype=dtype)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def assert_exact(inputs, impl, **options):
    out, lse = ak.coded_attention(*inputs, **options, impl=impl)
    query, codes, *tables = inputs
    case = exact.Case(query, None, None, codes, *tables, options=options)
    want, want_lse = exact.attend(case)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stages", [None, 1, 3])
@pytest.mark.parametrize("n", [3, 13])  # under and over the number of codewords
def test_float64_exact(impl, shared, groups, stages, n):
    assert_exact(coded(n=n, groups=groups, stages=stages, shared=shared), impl)


@pytest.mark.parametrize("rope_batch", [None, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stages", [None, 2])
def test_rope_and_mask(impl, rope_batch, masked, stages):
    lead = () if rope_batch is None else (rope_batch,)
    cos, sin = make_rope(*lead, 7, 16)
    if rope_batch == 1:
        cos, sin = cos.expand(2, -1, -1), sin.expand(2, -1, -1)
    mask = torch.rand(2, 7) > 0.4 if masked else None
    assert_exact(coded(groups=2, stages=stages), impl, rope=(cos, sin), code_mask=mask, scale=0.2)


def test_rope_of_batch_one_serves_all_rows(impl):
    inputs, rope = coded(), make_rope(1, 7, 16)
    mask = torch.rand(2, 7) > 0.4
    for code_mask in (None, mask):
        got = ak.coded_attention(*inputs, rope=rope, code_mask=code_mask, impl=impl)
        flat = (rope[0][0], rope[1][0])
        want = ak.coded_attention(*inputs, rope=flat, code_mask=code_mask, impl=impl)
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("masked", [False, True])
def test_value_codes_with_another_codebook(impl, masked):
    query, codes, key_codebook, _ = coded(groups=2)
    value_codebook = torch.randn(2, 3, 4, 9, 4, dtype=torch.float64)
    value_codes = torch.randint(0, 9, (2, 7, 2 * 4), dtype=torch.int32)
    mask = torch.rand(2, 7) > 0.4 if masked else None
    inputs = (query, codes, key_codebook, value_codebook)
    assert_exact(inputs, impl, value_codes=value_codes, code_mask=mask, rope=make_rope(7, 16))


@pytest.mark.parametrize("d", [16, 72, 80, 96, 256])
@pytest.mark.parametrize("use_rope", [False, True])
def test_any_dim(impl, d, use_rope):
    inputs = coded(1, 2, 1, 2, 5, d)
    assert_exact(inputs, impl, **({"rope": make_rope(5, d)} if use_rope else {}))


def test_odd_dim(impl):
    assert_exact(coded(1, 2, 2, 2, 5, 17), impl)


def test_most_codewords(impl):
    query, _, *tables = coded(1, 2, 1, 2, 5, 16, 65536)
    codes = torch.tensor([0, 65535, 32768, 65535, 1], dtype=torch.int32).view(1, 5, 1)
    assert_exact((query, codes, *tables), impl)


def pack_rows(codes, bits):
    return torch.stack([ak.pack(row.contiguous(), bits) for row in codes])


@pytest.mark.parametrize("bits", [3, 8, 11, 16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("known", ["mask", "rope", "num_tokens"])
def test_packed_codes(impl, bits, shared, known):
    query, codes, *tables = coded(groups=2, shared=shared)
    values = torch.randint(0, 5, codes.shape, dtype=torch.int32)
    options = {
        "mask": {"code_mask": torch.rand(2, 7) > 0.3},
        "rope": {"rope": make_rope(7, 16)},
        "num_tokens": {},
    }[known]
    want = ak.coded_attention(query, codes, *tables, value_codes=values, **options, impl=impl)
    if known == "num_tokens":
        options = {"num_tokens": 7}
    got = ak.coded_attention(
        query,
        pack_rows(codes, bits),
        *tables,
        value_codes=pack_rows(values, bits),
        code_bits=bits,
        **options,
        impl=impl,
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_packed_codes_tell_their_number(impl):
    query, codes, *tables = coded()
    want = ak.coded_attention(query, codes, *tables, impl=impl)
    got = ak.coded_attention(query, pack_rows(codes, 10), *tables, code_bits=10, impl=impl)
    assert torch.equal(got[0], want[0])


def test_no_tokens(impl):
    query, codes, *tables = coded(n=0)
    out, lse = ak.coded_attention(query, codes, *tables, impl=impl)
    assert torch.equal(out, torch.zeros_like(query))
    assert (lse == -INF).all()
    packed = torch.zeros(2, 0, dtype=torch.uint8)
    out, lse = ak.coded_attention(query, packed, *tables, code_bits=10, impl=impl)
    assert (lse == -INF).all()


@pytest.mark.parametrize("n", [4, 13])
def test_all_tokens_hidden(impl, n):
    query, codes, *tables = coded(n=n)
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0] = False
    out, lse = ak.coded_attention(query, codes, *tables, code_mask=mask, impl=impl)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -INF).all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("n", [4, 13])
@pytest.mark.parametrize("use_rope", [False, True])
def test_hidden_content_never_matters(impl, n, use_rope):
    """Impossible codes, NaN codewords that only they name, NaN positions."""
    query, codes, *tables = coded(n=n, dtype=torch.float32)
    mask = torch.rand(2, n) > 0.4
    codes = codes.clamp(min=1)  # codeword 0 is what hidden tokens could be looked up as
    rope = make_rope(2, n, 16, dtype=torch.float32) if use_rope else None
    want = ak.coded_attention(query, codes, *tables, code_mask=mask, rope=rope, impl=impl)
    hidden = ~mask.unsqueeze(-1)
    codes = codes.masked_fill(hidden, -(2**31))
    for table in tables:
        table[..., 0, :] = float("nan")
    if rope is not None:
        rope = tuple(x.masked_fill(hidden, float("nan")) for x in rope)
    got = ak.coded_attention(query, codes, *tables, code_mask=mask, rope=rope, impl=impl)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "use_rope"), [(100, True), (100, False), (600, False)])
def test_error_at_most_twice_that_of_sdpa(impl, dtype, n, use_rope):
    inputs = coded(1, 6, 3, 64, n, 64, 256, dtype=dtype)
    query, codes, *tables = inputs
    rope = make_rope(n, 64, dtype=dtype) if use_rope else None

    def peer(to):
        key, value = (reference.look_up(codes, table.to(to)) for table in tables)
        if rope is not None:
            key = apply_rope(key, tuple(x.to(to) for x in rope))
        return sdpa(query.to(to), key, value, enable_gqa=True)

    want = peer(torch.float64)
    out, _ = ak.coded_attention(*inputs, rope=rope, impl=impl)
    assert out.dtype == dtype
    assert (out - want).abs().max() <= 2 * (peer(dtype) - want).abs().max()


def test_tables_of_another_dtype(impl):
    query, codes, *tables = coded(dtype=torch.float32)
    half = [table.half() for table in tables]
    got = ak.coded_attention(query, codes, *half, impl=impl)
    want = ak.coded_attention(query, codes, *(table.float() for table in half), impl=impl)
    torch.testing.assert_close(got[0], want[0])
    long = ak.coded_attention(query, codes.long(), *half, impl=impl)
    assert torch.equal(long[0], got[0])


@pytest.mark.parametrize("n", [3, 13])
@pytest.mark.parametrize("use_rope", [False, True])
def test_strided_input(impl, n, use_rope):
    query, codes, *tables = coded(n=n)
    codes = codes.transpose(0, 1).contiguous().transpose(0, 1)[:, ::2]
    tables = [table.transpose(0, 2).contiguous().transpose(0, 2) for table in tables]
    rope = {"rope": make_rope(codes.shape[1], 16)} if use_rope else {}
    assert_exact((query.mT.contiguous().mT, codes, *tables), impl, **rope)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_merging_any_split_is_attention_over_all(data):
    n = data.draw(st.integers(0, 24))
    split = data.draw(st.integers(0, n))
    impl = data.draw(st.sampled_from(["auto", "reference"]))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    query, codes, *tables = coded(n=n)
    cos, sin = make_rope(n, 16)
    whole = ak.coded_attention(query, codes, *tables, rope=(cos, sin), impl=impl)
    parts = []
    for part in (slice(0, split), slice(split, n)):
        rope = (cos[part], sin[part])
        parts += ak.coded_attention(query, codes[:, part], *tables, rope=rope, impl=impl)
    merged = ak.merge_state(*parts, impl=impl)
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_reference_trains():
    query, codes, *tables = (x.requires_grad_() if x.is_floating_point() else x for x in coded())
    out, lse = reference.coded_attention(query, codes, *tables, rope=make_rope(7, 16))
    (out.sum() + lse.sum()).backward()
    assert all(x.grad.isfinite().all() for x in (query, *tables))
