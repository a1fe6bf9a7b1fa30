"""Ops as an engine calls them: they answer and refuse as the public ones do."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import astra_kernels as ak
from astra_kernels import _direct as direct
from astra_kernels.merge_state import reference


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_takes_in_another_from_some_row_on(first: int, dtype: torch.dtype) -> None:
    outs = [torch.randn(2, rows, 3, 6).transpose(1, 2).to(dtype) for rows in (7, 7 - first)]
    lses = [torch.randn(2, 3, rows) for rows in (7, 7 - first)]
    lses[0][0, 0, 3] = lses[1][1, 0, 2] = -math.inf
    lses[1][0, 1, 1] = math.nan
    wide = [out.double() for out in outs]
    want, _ = reference.merge_state(wide[0][:, :, first:], lses[0][:, :, first:], wide[1], lses[1])
    want = torch.cat([wide[0][:, :, :first], want], 2).to(dtype)
    found = direct.merge_into(outs[0], lses[0], outs[1], lses[1], first)
    torch.testing.assert_close(found, want, equal_nan=True)


def test_attention_and_what_does_not_fit() -> None:
    query, key, value = torch.randn(2, 4, 5, 8), *torch.randn(2, 2, 2, 7, 8)
    for causal in (False, True):
        found = direct.attention(query, key, value, is_causal=causal, scale=0.3)
        want = ak.attention(query, key, value, is_causal=causal, scale=0.3)
        torch.testing.assert_close(found, want)
    for wrong in (key[:1], key[..., :4], key[:, :, :6], torch.randn(2, 3, 7, 8)):
        with pytest.raises(ValueError, match=r"astra_kernels\.attention"):
            direct.attention(query, wrong, value, scale=0.3)


def test_attention_that_may_round(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(2, 6, 40, 32), *torch.randn(2, 2, 2, 77, 32)
    wide = (query.double(), key.double(), value.double())
    exact = ak.attention(*wide, scale=0.2, impl="reference")
    plain = direct.attention(query, key, value, scale=0.2)
    monkeypatch.setattr(direct, "MAY_ROUND", False)
    found = direct.attention(query, key, value, scale=0.2, rounded=True)
    assert all(map(torch.equal, found, plain))
    monkeypatch.setattr(direct, "MAY_ROUND", True)
    found = direct.attention(query, key, value, scale=0.2, rounded=True)
    for ours, want in zip(found, exact, strict=True):
        assert float((ours - want).norm() / want.norm()) < 0.008


@pytest.mark.parametrize("rows", [0, 1, 7, 250])
def test_an_affine_product(rows: int) -> None:
    x, matrix, bias = torch.randn(rows, 24), torch.randn(24, 37), torch.randn(37)
    want = (bias.double() + x.double() @ matrix.double()).float()
    for laid_out in (matrix, direct.columns_first(matrix)):
        assert torch.equal(laid_out, matrix)
        torch.testing.assert_close(direct.affine(bias, x, laid_out), want, rtol=1e-5, atol=1e-4)
        start = torch.randn(rows, 37)
        sums = (start.double() + x.double() @ matrix.double()).float()
        found = direct.affine(start, x, laid_out, in_place=True)
        torch.testing.assert_close(found, sums, rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="shape"):
        direct.affine(bias, x[:, 1:], direct.columns_first(matrix))


@pytest.mark.parametrize("rows", [3, 40])
def test_an_affine_product_that_may_round(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix, bias = torch.randn(rows, 31), torch.randn(31, 20), torch.randn(20)
    exact = bias.double() + x.double() @ matrix.double()
    for may in (False, True):
        monkeypatch.setattr(direct, "MAY_ROUND", may)
        either = direct.may_round(matrix)
        assert torch.equal(either.matrix, matrix)
        assert may or either.rounded is None
        added = torch.randn(rows, 20)
        for start, in_place in ((bias, False), (added, True)):
            want = exact - bias + start
            found = direct.affine(start.clone(), x, either, in_place=in_place)
            error = (found - want).norm() / want.norm()
            assert float(error) < (1e-6 if either.rounded is None else 0.005)


def test_rows_of_tables_are_added() -> None:
    tables = torch.randn(3, 5, 40).to(torch.bfloat16)
    codes = torch.randint(-1, 5, (9, 3), dtype=torch.int32)
    start = torch.randn(9, 40)
    rows = [tables[g][codes[:, g].clamp(min=0)] * (codes[:, g, None] >= 0) for g in range(3)]
    want = start.double() + torch.stack(rows).double().sum(0)
    found = direct.add_rows(start.clone(), codes, tables)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    codes[4, 1] = 5
    with pytest.raises(IndexError, match="less than 5, got 5"):
        direct.add_rows(start, codes, tables)


def test_an_affine_product_keeps_gradients() -> None:
    matrix = direct.columns_first(torch.randn(6, 5))
    with torch.enable_grad():
        x = torch.randn(8, 6, requires_grad=True)
        start = direct.affine(torch.zeros(5), x, matrix)
        direct.affine(start, x, matrix, in_place=True).sum().backward()
    torch.testing.assert_close(x.grad, 2 * matrix.sum(1).expand(8, 6))


def test_codewords_and_codes() -> None:
    table = torch.randn(3, 16, 5)
    codes = torch.randint(0, 16, (2, 7, 3), dtype=torch.int32)
    assert torch.equal(direct.decode(codes, table), ak.decode(codes, table))
    assert torch.equal(direct.decode(codes[:, ::2], table), ak.decode(codes[:, ::2], table))
    assert torch.equal(direct.encode(direct.decode(codes, table), table), codes)
    for wrong in (-1, 16):
        codes[1, 6, 2] = wrong
        with pytest.raises(ValueError, match=str(wrong)):
            direct.decode(codes, table)
    with pytest.raises(ValueError, match="vectors"):
        direct.encode(torch.randn(2, 3, 4), table)


def test_attention_to_codes_and_their_values() -> None:
    query, tables, rope = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 16, 8), torch.randn(2, 9, 8)
    codes = torch.randint(0, 16, (2, 9, 2), dtype=torch.int32)
    options = {"code_bits": None, "num_tokens": None, "scale": 0.3}
    keys, values = tables[:, :1], tables[:, 1:]
    for mask in (None, torch.rand(2, 9) < 0.5):
        more = options | {"rope": tuple(rope), "code_mask": mask}
        found = direct.coded_attention(query, codes, keys, values, **more)
        torch.testing.assert_close(found, ak.coded_attention(query, codes, keys, values, **more))
    more["code_mask"] = None
    with pytest.raises(ValueError, match="codes"):
        direct.coded_attention(query, codes[..., :1].expand(2, 9, 3), keys, values, **more)
    codes[1, 8, 1] = 16
    with pytest.raises(ValueError, match="codes"):
        direct.coded_attention(query, codes, keys, values, **more)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    x = torch.randn(2, 3, 9, 33)
    views: list[Tensor] = [x, x.transpose(1, 2), x[1], x[1, 2], x[1, 2, 8]]
    views += [x.transpose(1, 2)[:, :, 1:], x[1:].transpose(1, 2)[..., 1:]]
    assert direct.all_finite([*views, x[:0]]) is True
    assert direct.all_finite([x[..., ::2]]) is None
    x[1, 2, 8, 32] = bad
    assert [direct.all_finite([view]) for view in views] == [False] * len(views)


def test_who_traces_sees_the_public_op() -> None:
    given = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3), torch.randn(1, 2, 3, 4)
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda out, lse, other: direct.merge_into(out, lse, other, lse, 0)
    )(*given)
    assert "astra.merge_state" in graph.code
