"""ak.scaled_dot_product_attention is torch's: the same numbers, gradients and errors."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import astra_kernels as ak

ours = importlib.import_module("astra_kernels.scaled_dot_product_attention")
INF = float("inf")

# Shapes of query, key and value.
SHAPES = {
    "four axes": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "more queries": ((2, 4, 9, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "square": ((2, 4, 7, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "wide values": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 12)),
    "three axes": ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "two axes": ((5, 8), (7, 8), (7, 4)),
    "five axes": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8)),
    "one head of keys": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one head of values": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 1, 7, 8)),
    "one row of queries": ((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "fewer axes of keys": ((2, 4, 5, 8), (4, 7, 8), (7, 8)),
    "a batch row of five axes": ((2, 3, 4, 5, 8), (3, 1, 7, 8), (1, 1, 1, 7, 8)),
    "no queries": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "no keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
    "no rows": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)),
}
GROUPED = {
    "grouped": ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    "grouped, three axes": ((4, 5, 8), (2, 7, 8), (2, 7, 8)),
    "grouped, five axes": ((2, 2, 4, 5, 8), (2, 2, 2, 7, 8), (2, 2, 2, 7, 8)),
    "grouped, one head": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
}


def inputs(shapes, dtype=torch.float64, grad=False):
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def assert_same(shapes, mask=None, **options):
    """By our own op, and as torch: numbers and gradients."""
    args = inputs(shapes, grad=True)
    call = ours._arranged(*args, mask, options.get("enable_gqa", False))
    assert call is not None
    out = ak.scaled_dot_product_attention(*args, attn_mask=mask, **options)
    want = sdpa(*args, attn_mask=mask, **options)
    torch.testing.assert_close(out, want)
    inputs_ = [*args, mask] if mask is not None and mask.requires_grad else args
    weight = torch.randn_like(want)
    got = torch.autograd.grad(out, inputs_, weight)
    torch.testing.assert_close(got, torch.autograd.grad(want, inputs_, weight))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, is_causal):
    assert_same(SHAPES[name], is_causal=is_causal, scale=0.3)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", GROUPED)
def test_grouped_heads(name, is_causal):
    assert_same(GROUPED[name], is_causal=is_causal, enable_gqa=True)


@pytest.mark.parametrize("kind", ["bool", "float", "learned"])
@pytest.mark.parametrize(
    "name", ["four axes", "three axes", "two axes", "five axes", "wide values"]
)
def test_masks(name, kind):
    (*lead, rows, _), (*_, tokens, _), _ = SHAPES[name]
    shapes = [(rows, tokens), (1, tokens), (rows, 1), (*lead, rows, tokens)]
    if len(lead) > 1:
        shapes += [(lead[0], *[1] * (len(lead) - 1), 1, tokens), (lead[-1], rows, 1)]
    for shape in shapes:
        mask = torch.rand(shape) > 0.4
        if kind != "bool":
            mask = torch.randn(shape, dtype=torch.float64).masked_fill(~mask, -INF)
        assert_same(SHAPES[name], mask.requires_grad_(kind == "learned"))


def test_masks_over_grouped_heads():
    for shape in ((5, 7), (2, 1, 1, 7), (4, 5, 1), (2, 4, 5, 7)):
        assert_same(GROUPED["grouped"], torch.rand(shape) > 0.4, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_layout(dtype):
    for name in ("four axes", "three axes"):
        args = inputs(SHAPES[name], dtype)
        for mask in (None, torch.randn(5, 7, dtype=dtype), torch.randn(5, 7)):
            out, peer = (f(*args, attn_mask=mask) for f in (ak.scaled_dot_product_attention, sdpa))
            wide = None if mask is None else mask.double()
            want = sdpa(*(x.double() for x in args), attn_mask=wide)
            assert out.dtype == dtype
            assert (out - want).abs().max() <= 2 * (peer - want).abs().max()
            assert out.stride() == peer.stride()


def test_what_torch_does_itself(monkeypatch):
    """Dropout, vmap, forward mode, other dtypes and shapes: torch's own function is called."""
    calls = []

    def recorded(*args, **options):
        calls.append(options)
        return sdpa(*args, **options)

    monkeypatch.setattr(ours, "torch_sdpa", recorded)
    query, key, value = inputs(SHAPES["four axes"], torch.float32)
    op = ak.scaled_dot_product_attention
    torch.manual_seed(3)
    out = op(query, key, value, dropout_p=0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(out, sdpa(query, key, value, dropout_p=0.5))
    assert len(calls) == 1
    torch.testing.assert_close(torch.func.vmap(op)(query, key, value), sdpa(query, key, value))
    assert len(calls) == 2
    mask = torch.rand(5, 7) > 0.4
    mask[:, 0] = True
    torch.testing.assert_close(op(query, key, value, mask, is_causal=True),
                               sdpa(query, key, value, mask, is_causal=True))  # fmt: skip
    assert len(calls) == 3
    op(query, key, value)
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own, of forward mode
def test_forward_mode_is_torchs():
    # For these torch takes its math path, which has forward mode.
    args = inputs(SHAPES["wide values"])
    tangents = [torch.randn_like(x) for x in args]
    got, want = (
        torch.func.jvp(lambda *x: f(*x), tuple(args), tuple(tangents))  # noqa: B023
        for f in (ak.scaled_dot_product_attention, sdpa)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({}, {"attn_mask": torch.ones(3, 2, 4, 5, 7).bool()}),
        ({}, {"attn_mask": torch.ones(5, 7).int()}),
        ({}, {"attn_mask": torch.ones(5, 6).bool()}),
        ({1: torch.randn(2, 4, 7, 9)}, {}),
        ({1: torch.randn(2, 4, 7, 8).double()}, {}),
        ({1: torch.randn(2, 3, 7, 8), 2: torch.randn(2, 3, 7, 8)}, {}),
        ({1: torch.randn(2, 3, 7, 8), 2: torch.randn(2, 3, 7, 8)}, {"enable_gqa": True}),
        ({0: torch.randn(8)}, {}),
        ({2: [1.0]}, {}),
    ],
)
def test_errors_are_torchs(change, options):
    args = inputs(SHAPES["four axes"], torch.float32)
    args = [change.get(place, x) for place, x in enumerate(args)]
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)) as want:
        sdpa(*args, **options)
    with pytest.raises(want.type) as got:
        ak.scaled_dot_product_attention(*args, **options)
    assert str(got.value) == str(want.value)


def test_compiled_whole():
    torch._dynamo.reset()
    compiled = torch.compile(ak.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    for shapes, options in (
        (SHAPES["square"], {"is_causal": True}),
        (SHAPES["more queries"], {"is_causal": True}),
        (GROUPED["grouped"], {"attn_mask": torch.rand(5, 7) > 0.4, "enable_gqa": True}),
    ):
        args = inputs(shapes, grad=True)
        out, want = compiled(*args, **options), sdpa(*args, **options)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), args), torch.autograd.grad(want.sum(), args)
        )


@pytest.mark.parametrize("others", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_is_torchs(others):
    query = torch.randn(1, 2, 5, 8)
    key, value = (torch.randn(1, 2, 6, 8, dtype=others) for _ in range(2))
    for mask in (None, torch.randn(5, 6), torch.rand(5, 6) < 0.7):
        with torch.autocast("cpu", torch.bfloat16):
            if others == torch.float64:  # which torch does not cast
                with pytest.raises(RuntimeError):
                    ak.scaled_dot_product_attention(query, key, value, mask)
                continue
            got = ak.scaled_dot_product_attention(query, key, value, mask)
            want = sdpa(query, key, value, mask)
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
