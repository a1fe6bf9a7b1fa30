"""Half precision on a CPU: a block at a time is brought to fp32, never a call's tensors whole."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import astra_kernels as ak
from astra_kernels.attention import cpu, gradient

H, HKV, M, L, D = 4, 2, 8, 4000, 64
MOST = 2**17
INF = float("inf")


class Largest(TorchDispatchMode):
    """The most numbers of an fp32 tensor that torch's operators make."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                self.numbers = max(self.numbers, leaf.numel())
        return result


def cases():
    generator = torch.Generator().manual_seed(1)
    keys = torch.rand(1, L, generator=generator) > 0.3
    bias = torch.randn(L, generator=generator)
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "window": {"window": (2000, 0)},
        "bool": {"attn_mask": keys.expand(M, -1)},
        "float": {"attn_mask": bias.expand(1, 1, 1, -1)},
        "keys": {"attn_mask": bias.bfloat16().expand(1, -1), "key_mask": keys, "sinks": bias[:H]},
        "softcap": {"softcap": 2.0},
    }


def inputs():
    return [torch.randn(1, h, n, D).bfloat16() for h, n in ((H, M), (HKV, L), (HKV, L))]


def in_float64(tensors, options):
    """The state and the gradients."""
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }
    args = [x.double().requires_grad_() for x in tensors]
    state = ak.attention(*args, **wide, impl="reference")
    return state, torch.autograd.grad(state[0].sum() + state[1].sum(), args)


@pytest.mark.parametrize("name", cases())
def test_no_tensor_is_converted_whole(monkeypatch, name):
    for module in (cpu, gradient):
        monkeypatch.setattr(module, "MOST_CONVERTED", MOST)
    options, tensors = cases()[name], inputs()
    (want, want_lse), want_grads = in_float64(tensors, options)
    with Largest() as made:
        out, lse = cpu.attention(*tensors, **options)
    # A KV head's keys would be more.
    assert made.numbers <= MOST < L * D
    torch.testing.assert_close(out, want.bfloat16(), rtol=8e-3, atol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), rtol=1e-5, atol=1e-5)

    grad_out = torch.ones_like(out)
    wanted = frozenset(("query", "key", "value"))
    with Largest() as made:
        grads = gradient.attention(
            grad_out, torch.ones_like(lse), out, lse, *tensors, **options, wanted=wanted
        )
    # Eight channels are added for the gradient of lse.
    assert made.numbers <= MOST * 1.125
    for name, want_grad in zip(("query", "key", "value"), want_grads, strict=True):
        assert grads[name].dtype == torch.bfloat16
        error = (grads[name] - want_grad).norm() / want_grad.norm()
        assert error < 1e-2


@pytest.mark.parametrize("name", ["float", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_looked_up_some_at_a_time(monkeypatch, dtype, name):
    module = sys.modules["astra_kernels.coded_attention.cpu"]
    monkeypatch.setattr(module, "LOOKED_UP", MOST)
    codes = torch.randint(0, 64, (1, L, HKV), dtype=torch.int32)
    query = torch.randn(1, H, M, D, dtype=dtype)
    tables = torch.randn(2, HKV, 1, 64, D, dtype=dtype).unbind()
    angles = torch.randn(2, L, D, dtype=dtype).unbind()
    options = {"softcap": 2.0} if name == "softcap" else {"attn_mask": torch.randn(L)}
    options |= {"rope": angles, "sinks": torch.randn(H)}
    want = ak.coded_attention(query, codes, *tables, **options, impl="reference")
    with Largest() as made:
        got = module.coded_attention(query, codes, *tables, **options)
    assert made.numbers <= MOST < L * D
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=8e-3, atol=1e-5)
    # No lse tells parts apart where the smallest number is added to all scores.
    lowest = torch.full((L,), torch.finfo(torch.float32).min)
    out, _ = module.coded_attention(query, codes, *tables, attn_mask=lowest)
    want, _ = ak.coded_attention(query, codes, *tables, attn_mask=lowest, impl="reference")
    torch.testing.assert_close(out, want, rtol=8e-3, atol=1e-5)


@pytest.mark.parametrize(("dtype", "serves"), [(torch.float16, False), (torch.bfloat16, True)])
def test_parts_make_up_the_whole(monkeypatch, dtype, serves):
    """Some heads, rows and keys at a time; also where the C++ kernel does not serve."""
    monkeypatch.setattr(cpu, "HEADS_CONVERTED", 1)
    monkeypatch.setattr(cpu, "MOST_CONVERTED", 1)
    monkeypatch.setattr(sys.modules["astra_kernels.attention.native"], "_SERVES", serves)
    query, key, value = (torch.randn(2, h, 300, 16, dtype=dtype) for h in (4, 2, 2))
    value = torch.cat((value, value), dim=3)
    lowest = torch.zeros(300, 300)
    # Rows that the smallest number leaves as they were to one another: no lse tells parts apart.
    lowest[5:9] = torch.finfo(torch.float32).min
    lowest[7, :150] = 0.0
    hidden = torch.zeros(2, 4, 300, 300).masked_fill(torch.rand(2, 1, 300, 300) > 0.5, -INF)
    hidden[:, :, 3] = -INF
    for options in (
        {},
        {"is_causal": True},
        {"key_mask": torch.rand(2, 300) > 0.4},
        {"window": (100, 4), "sinks": torch.randn(4)},
        {"attn_mask": lowest},
        {"attn_mask": hidden},
        {"attn_mask": hidden > -1, "key_mask": torch.rand(2, 300) > 0.4},
    ):
        out, lse = cpu.attention(query, key, value, **options)
        want = ak.attention(query, key, value, **options, impl="reference")
        torch.testing.assert_close(out, want[0], rtol=8e-3, atol=1e-3)
        torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)
