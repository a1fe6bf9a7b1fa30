"""The gradient of dense attention in Triton, beside autograd through the reference in float64."""

from __future__ import annotations

import pytest
import torch

import astra_kernels as ak
from astra_kernels import _dispatch
from astra_kernels._triton import gradient
from astra_kernels._triton.gradient import attention_gradient
from astra_kernels._triton.sources import Dense
from astra_kernels.attention import reference

pytestmark = pytest.mark.usefixtures("poisoned")

B, H, HKV, D = 2, 4, 2, 16
INF = float("inf")


def masks(kind, rows, tokens):
    return {
        "bool": torch.rand(B, 1, rows, tokens) > 0.4,
        "float": torch.randn(H, rows, tokens).masked_fill(torch.rand(rows, tokens) > 0.7, -INF),
    }[kind]


CASES = [
    (5, 40, 16, {}),
    (35, 40, 24, {"is_causal": True}),
    (9, 5, 16, {"is_causal": True}),
    (35, 70, 8, {"window": (17, 3)}),
    (35, 70, 16, {"window": (11, 0), "softcap": 1.5, "scale": -0.4}),
    (5, 40, 16, {"attn_mask": "bool", "key_mask": True}),
    (5, 40, 72, {"attn_mask": "float", "softcap": 2.0}),
]


def make(rows, tokens, width, given, dtype=torch.float32):
    options = dict(given)
    if "attn_mask" in options:
        options["attn_mask"] = masks(options["attn_mask"], rows, tokens)
    if options.pop("key_mask", False):
        options["key_mask"] = torch.rand(B, tokens) > 0.3
        options["key_mask"][1] = False
    shapes = (B, H, rows, D), (B, HKV, tokens, D), (B, HKV, tokens, width)
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    # grad_out as it may come: transposed
    grad_out = torch.randn(B, rows, H, width, dtype=dtype).transpose(1, 2)
    return inputs, options, grad_out, torch.randn(B, H, rows)


def want(inputs, options, grad_out, grad_lse):
    doubled = [x.double().requires_grad_() for x in inputs]
    options = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }
    out, lse = reference.attention(*doubled, **options)
    seen = lse.isfinite()
    loss = (out * grad_out.double()).sum() + (lse[seen] * grad_lse.double()[seen]).sum()
    return torch.autograd.grad(loss, doubled)


def got(inputs, options, grad_out, grad_lse):
    query, key, value = inputs
    options = dict(options)
    scale, softcap = options.pop("scale", None), options.pop("softcap", None)
    out, lse = ak.attention(*inputs, **options, scale=scale, softcap=softcap, impl="reference")
    delta = (grad_out.float() * out.float()).sum(-1) - grad_lse
    dense = Dense(
        key, value, options.get("is_causal", False), options.get("key_mask"),
        options.get("attn_mask"), options.get("window"),
    )  # fmt: skip
    return attention_gradient(
        query, dense, lse, grad_out, delta, D**-0.5 if scale is None else scale, softcap
    )


@pytest.mark.parametrize(("rows", "tokens", "width", "given"), CASES, ids=str)
def test_gradients(rows, tokens, width, given):
    case = make(rows, tokens, width, given)
    for a, b in zip(got(*case), want(*case), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_autograd_takes_it_where_triton_runs(monkeypatch):
    inputs, options, grad_out, grad_lse = make(35, 40, 24, {"window": (9, 2), "softcap": 2.0})
    options["sinks"] = torch.randn(H)

    def gradients():
        fresh = [x.clone().requires_grad_() for x in inputs]
        out, lse = ak.attention(*fresh, **options)
        return torch.autograd.grad((out, lse), fresh, (grad_out, grad_lse))

    by_blocks, calls = gradients(), []
    monkeypatch.setattr(_dispatch, "runs_triton", lambda device: True)
    monkeypatch.setattr(
        gradient, "attention_gradient", lambda *x: calls.append(1) or attention_gradient(*x)
    )
    for a, b in zip(gradients(), by_blocks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert calls == [1]


def test_16_bits():
    case = make(35, 40, 24, {"is_causal": True}, torch.float16)
    for a, b in zip(got(*case), want(*case), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2)


def test_the_same_bits_each_time():
    case = make(35, 40, 16, {"is_causal": True})
    for a, b in zip(got(*case), got(*case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_hidden_tokens_hold_never_matters():
    inputs, options, *grads = make(5, 40, 16, {"attn_mask": "float"})
    options["attn_mask"][..., 3] = -INF
    options["key_mask"] = torch.ones(B, 40, dtype=torch.bool)
    options["key_mask"][:, 7] = False
    before = got(inputs, options, *grads)
    for token in (3, 7):
        inputs[1][:, :, token] = inputs[2][:, :, token] = float("nan")
    for a, b in zip(got(inputs, options, *grads), before, strict=True):
        assert torch.equal(a, b)
