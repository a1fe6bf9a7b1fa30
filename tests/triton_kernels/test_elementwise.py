"""The small steps of a block beside their formulas, also in how they round."""

from __future__ import annotations

import pytest
import torch

from astra_kernels import _elementwise as elementwise
from astra_kernels._elementwise import kernel, native, reference
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import fused
from tests.runtime.models import fitted, inputs_for, tiny


def assert_rounded_alike(got, want):
    """Nearly all to the bit, the rest to the last one: exp and sums are not the same to the bit."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-6)
    if got.dtype != torch.float32:
        assert (got != want).sum() <= 0.01 * got.numel()


@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 3), (3, 64), (2, 40, 576), (0, 8), (2, 0, 8)])
def test_norm_and_gate(dtype, shape):
    x, up, weight = (torch.randn(size).to(dtype) for size in (shape, shape, shape[-1:]))
    want = reference.rms_norm(x, weight, 1e-5)
    assert_rounded_alike(kernel.rms_norm(x, weight, 1e-5), want)
    assert_rounded_alike(kernel.gated_silu(x, up), reference.gated_silu(x, up))


def assert_rotated(got, x, cos, sin):
    """As exact as two rounded products and their rounded sum."""
    x, cos, sin = x.double(), cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    first, second = x.chunk(2, -1)
    stays, turns = x * cos, torch.cat((-second, first), -1) * sin
    info = torch.finfo(got.dtype)
    bound = info.eps * (stays.abs() + turns.abs() + info.tiny)
    assert ((got.double() - stays - turns).abs() <= bound).all()


@pytest.mark.parametrize("angles", [1, 2])
@pytest.mark.parametrize(
    ("heads", "tokens", "width"), [(1, 1, 2), (3, 5, 6), (9, 70, 64), (2, 0, 8)]
)
def test_rotation(dtype, heads, tokens, width, angles):
    x = torch.randn(2, tokens, heads, width).to(dtype).transpose(1, 2)  # as a projection gives it
    cos, sin = torch.randn(2, angles, tokens, width).to(dtype)
    want = reference.rotate(x, cos, sin)
    got = kernel.rotate(x, cos, sin)
    assert got.stride() == torch.empty_like(x).stride()
    if x.device.type == "cuda":  # compiled, one or two in a hundred are rounded to the other side
        assert_rotated(got, x, cos, sin)
        return
    assert_rounded_alike(got, want)
    assert_rounded_alike(kernel.rotate(x.contiguous(), cos, sin), want)
    part = torch.randn(2, heads, tokens + 3, width).to(dtype)[:, :, 1 : tokens + 1]
    assert_rounded_alike(kernel.rotate(part, cos, sin), reference.rotate(part, cos, sin))


@pytest.mark.filterwarnings("ignore")  # numpy's, of the interpreter
def test_what_is_not_finite_stays():
    x = torch.tensor([[1.0, torch.nan, 2.0, 3.0], [torch.inf, 1.0, 1.0, 1.0], [-200.0, 0, 200, 1]])
    for got, want in (
        (kernel.rms_norm(x, torch.ones(4), 1e-5), reference.rms_norm(x, torch.ones(4), 1e-5)),
        (kernel.gated_silu(x, x), reference.gated_silu(x, x)),
    ):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_gradients_and_mixed_dtypes_go_by_the_formula(monkeypatch):
    monkeypatch.setattr(elementwise, "runs_triton", lambda device: True)
    x = torch.randn(3, 4, requires_grad=True)
    assert not elementwise.on_gpu(x)  # on the CPU; and where a gradient is recorded:
    out = elementwise.rms_norm(x, torch.ones(4), 1e-5)
    assert out.requires_grad


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_models_take_them(monkeypatch, device, kind):
    """Ranks whose blocks go by the kernels answer what ranks do whose blocks go by the formulas."""
    if device != "cpu":
        pytest.skip("what a GPU does is compared with the CPU elsewhere")
    taken = []

    def served(name):
        def run(*args):
            taken.append(name)
            return getattr(kernel, name)(*args)

        return run

    model, inputs = tiny(kind), inputs_for(kind, 26)
    book = fitted(kind, model, space="kv", groups=3)

    def logits(mesh):
        from astra_runtime import Engine

        with Engine(model, book, mesh) as engine:
            return engine(**inputs, logits="all").logits

    monkeypatch.setattr(native, "can_run", lambda *tensors: False)
    want = run_ranks(1, logits)[0]
    for module in (elementwise, fused):
        monkeypatch.setattr(module, "on_gpu", lambda *tensors: True)
    monkeypatch.setattr(elementwise, "_triton", served)
    got = run_ranks(1, logits)[0]
    assert set(taken) == {"rms_norm", "gated_silu", "rotate"}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
