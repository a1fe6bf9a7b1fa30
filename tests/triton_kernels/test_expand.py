"""Codes to dense vectors: exact where nothing is added up, else as exact as plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astra_kernels._rotary import apply_rope
from astra_kernels._triton.expand import expand
from astra_kernels.coded_attention.reference import look_up
from astra_kernels.pack import reference as pack_reference
from tests.triton_kernels.cases import examples

pytestmark = pytest.mark.usefixtures("poisoned")


def make(b=2, n=7, kv=3, d=16, k=5, groups=1, stages=1, shared=False, dtype=torch.float32):
    table = torch.randn(stages, kv, groups, k, d // groups).to(dtype)
    codes = torch.randint(0, k, (b, n, stages * groups * (1 if shared else kv)), dtype=torch.int32)
    return codes, table


def make_rope(*shape):
    angle = torch.randn(*shape[:-1], shape[-1] // 2)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def run(codes, table, **options):
    stages, _, groups, _, _ = table.shape
    options = {"dtype": table.dtype, "code_bits": None, **options}
    shared = options.pop("shared", codes.shape[-1] == stages * groups)
    batch, tokens = options.pop("size", codes.shape[:2])
    return expand(codes, table, batch, tokens, shared=shared, **options)


def plain(codes, table, rope=None, code_mask=None):
    vectors = look_up(codes, table, code_mask)
    if rope is not None:
        vectors = apply_rope(vectors, tuple(x.to(table.dtype) for x in rope))
    return vectors


def assert_as_exact_as_torch(got, codes, table, **options):
    """Error at most twice that of plain torch in the same dtype, both against float64."""
    want = plain(codes, table.double(), **options)
    peer = plain(codes, table, **options)
    assert got.shape == want.shape
    assert got.transpose(1, 2).is_contiguous()
    assert (got - want).abs().max() <= 2 * (peer - want).abs().max()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("groups", "d"), [(1, 17), (4, 64), (2, 72)])
def test_one_stage_is_exact(dtype, shared, groups, d):
    codes, table = make(groups=groups, d=d, shared=shared, dtype=dtype)
    got = run(codes, table)
    assert got.dtype == dtype
    assert got.transpose(1, 2).is_contiguous()
    assert torch.equal(got, plain(codes, table))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("rotary", [False, True])
def test_stages(dtype, shared, groups, rotary):
    codes, table = make(n=40, d=32, groups=groups, stages=3, shared=shared, dtype=dtype)
    options = {"rope": make_rope(40, 32)} if rotary else {}
    assert_as_exact_as_torch(run(codes, table, **options), codes, table, **options)


@pytest.mark.parametrize(
    ("rope_batch", "groups", "d"),
    [(None, 1, 16), (1, 2, 64), (2, 2, 64), (None, 1, 72), (2, 4, 8), (None, 2, 2)],
)
def test_rotary(dtype, rope_batch, groups, d):
    codes, table = make(n=40, groups=groups, d=d, dtype=dtype)
    rope = make_rope(*(() if rope_batch is None else (rope_batch,)), 40, d)
    assert_as_exact_as_torch(run(codes, table, rope=rope), codes, table, rope=rope)


def test_second_half_of_angles_is_not_read():
    codes, table = make(n=40)
    rope = make_rope(40, 16)
    want = run(codes, table, rope=rope)
    for angles in rope:
        angles[:, 8:] = float("nan")
    assert torch.equal(run(codes, table, rope=rope), want)


def test_rotary_angles_that_are_views():
    codes, table = make(n=40)
    cos, sin = make_rope(2, 40, 16)
    spread = torch.stack((cos, sin), dim=-1)
    rope = (spread[..., 0], spread[..., 1])
    assert torch.equal(run(codes, table, rope=rope), run(codes, table, rope=(cos, sin)))
    flat = (cos[0], sin[0])
    want = run(codes, table, rope=flat)
    assert torch.equal(run(codes, table, rope=tuple(x.expand(2, -1, -1) for x in flat)), want)
    assert torch.equal(run(codes, table, rope=(flat[0], flat[1][None])), want)


@pytest.mark.parametrize("rotary", [False, True])
def test_hidden_tokens_are_zero(rotary):
    codes, table = make(n=40)
    mask = torch.rand(2, 40) > 0.5
    codes = codes.masked_fill(~mask[..., None], -99)
    cos, sin = make_rope(2, 40, 16)
    rope = (cos.masked_fill(~mask[..., None], float("nan")), sin) if rotary else None
    got = run(codes, table, rope=rope, code_mask=mask)
    assert (got.transpose(1, 2)[~mask] == 0).all()
    seen = run(codes.clamp(min=0), table, rope=rope).transpose(1, 2)[mask]
    assert torch.equal(got.transpose(1, 2)[mask], seen)


@pytest.mark.parametrize("bits", range(1, 17))
def test_packed(bits):
    codes, table = make(n=9, k=2**bits, d=4, groups=2, stages=2)
    packed = torch.stack([pack_reference.pack(row, bits) for row in codes])
    got = run(packed, table, shared=False, size=(2, 9), code_bits=bits)
    assert torch.equal(got, run(codes, table))


@pytest.mark.parametrize("target", [torch.float16, torch.float32])
def test_into_another_dtype(target):
    for source in (torch.float16, torch.float32, torch.float64):
        codes, table = make(d=64, dtype=source)
        got = run(codes, table, dtype=target)
        assert got.dtype == target
        assert torch.equal(got, plain(codes, table).to(target))


@examples(30)
@given(
    b=st.integers(0, 3),
    n=st.integers(0, 50),
    kv=st.integers(1, 3),
    half=st.integers(1, 20),
    groups=st.sampled_from([1, 2]),
    k=st.sampled_from([1, 7]),
    shared=st.booleans(),
    masked=st.booleans(),
    rotary=st.booleans(),
)
def test_any_shape(b, n, kv, half, groups, k, shared, masked, rotary):
    codes, table = make(b, n, kv, 2 * half, k, groups, shared=shared)
    mask = torch.rand(b, n) > 0.5 if masked else None
    rope = make_rope(n, 2 * half) if rotary else None
    got = run(codes, table, shared=shared, rope=rope, code_mask=mask)
    want = plain(codes, table, rope, mask)
    if rotary:
        torch.testing.assert_close(got, want)
    else:
        assert torch.equal(got, want)


def test_strided():
    codes, table = make(b=3, n=5, kv=2, d=16)
    want = run(codes, table)
    strided = codes.transpose(0, 2).contiguous().transpose(0, 2)
    table = table.transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(run(strided, table), want)


def test_codes_out_of_range_read_nothing_outside():
    codes, table = make(k=5, kv=1)
    wild = torch.randint(-(2**31), 2**31 - 1, codes.shape, dtype=torch.int32)
    wild[:, :3] = codes[:, :3]
    last = torch.where((wild >= 0) & (wild < 5), wild, 4)
    assert torch.equal(run(wild, table), plain(last, table))
