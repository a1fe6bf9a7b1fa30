"""Linear layers by packed weights: the same products, present during calls only."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from astra_kernels import _C
from astra_kernels import _direct as direct
from astra_runtime import Engine
from astra_runtime.cores import available_bytes
from astra_runtime.errors import ModelChanged
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt, packed
from astra_runtime.models.packed import PackedForward, can_pack, packable
from astra_runtime.transport import Mesh

from .models import inputs_for, tiny

needs_mkl = pytest.mark.skipif(not can_pack(), reason="this torch has no MKL")


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of any size are packed."""
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 1)


@needs_mkl
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (100, 37), (33, 1)])
def test_products_of_any_number_of_rows_are_right(inputs: int, outputs: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer = nn.Linear(inputs, outputs, bias=outputs != 37)
        forward = PackedForward(layer)
        for rows in (1, 4, 17, 64, 129, 1025, 1500):
            vectors = torch.randn(1, rows, inputs)
            with torch.no_grad():
                out = forward(vectors)
            exact = F.linear(vectors.double(), layer.weight.double())
            exact += 0 if layer.bias is None else layer.bias.double()
            assert out.shape == exact.shape
            torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (800, 37), (33, 1)])
def test_products_with_weights_as_they_are_stored_are_right(
    inputs: int, outputs: int, threads: int
) -> None:
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    for rows in (0, 1, 4, 17, 50, 65, 129, 300):
        vectors, out = torch.randn(rows, inputs), torch.full((rows + 1, outputs), float("nan"))
        given = vectors.data_ptr(), weight.data_ptr(), bias.data_ptr()
        _C.product(*given, rows, inputs, outputs, out.data_ptr(), threads)
        exact = F.linear(vectors.double(), weight.double(), bias.double())
        torch.testing.assert_close(out[:rows], exact.float(), rtol=1e-4, atol=1e-4)
        assert out[rows].isnan().all()  # nothing is written behind the rows


@pytest.mark.skipif(not direct.HAS_PRODUCT, reason="measured with AVX-512 alone")
def test_layers_of_a_call_read_their_weights_as_they_are_stored(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, runs = tiny("llama"), inputs_for("llama", 12), []
    own = direct.linear

    def counted(*given: torch.Tensor) -> torch.Tensor:
        runs.append(given[1])
        return own(*given)

    monkeypatch.setattr(direct, "linear", counted)
    with torch.no_grad():
        alone = model(**inputs).logits
    with Engine(model) as engine:
        assert not runs
        torch.testing.assert_close(
            engine(**inputs, logits="all").logits, alone, rtol=1e-4, atol=1e-5
        )
    layers = packable(adapt(model).blocks)
    assert {id(weight) for weight in runs} == {id(layer.weight) for layer in layers}
    assert not any("forward" in layer.__dict__ for layer in layers)


@needs_mkl
def test_what_is_no_plain_product_goes_the_layers_own_way() -> None:
    layer = nn.Linear(64, 32)
    forward = PackedForward(layer)
    vectors = torch.randn(8, 64, requires_grad=True)
    forward(vectors).sum().backward()
    torch.testing.assert_close(vectors.grad, layer.weight.detach().sum(0).expand(8, 64))
    with torch.no_grad():
        assert forward(torch.randn(0, 64)).shape == (0, 32)
        turned = torch.randn(64, 8).T
        torch.testing.assert_close(forward(turned), layer(turned))
        layer.weight = nn.Parameter(torch.zeros(32, 64))
        torch.testing.assert_close(forward(torch.ones(8, 64)), layer.bias.expand(8, 32))


@needs_mkl
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_an_engine_of_packed_weights_answers_as_the_model(family: str, small: None) -> None:
    model, inputs = tiny(family), inputs_for(family, 24)
    with torch.no_grad():
        alone = model(**inputs)
    with Engine(model, pack_weights=True) as engine:
        assert adapt(model).hooks.packed_bytes > 0
        called = engine(**inputs, logits="all" if family == "llama" else "last")
        assert not any("forward" in layer.__dict__ for layer in linears(model))
    assert adapt(model).hooks.packed_bytes == 0
    key = "logits" if "logits" in alone else "last_hidden_state"
    torch.testing.assert_close(called[key], alone[key], rtol=1e-4, atol=1e-5)


@needs_mkl
def test_the_packed_products_are_those_that_a_call_runs(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runs = tiny("llama"), []
    own = PackedForward.__call__

    def counted(self: PackedForward, vectors: torch.Tensor) -> torch.Tensor:
        runs.append(self.layer)
        return own(self, vectors)

    monkeypatch.setattr(PackedForward, "__call__", counted)
    with Engine(model, pack_weights=True) as engine:
        engine(**inputs_for("llama", 12))
    assert set(runs) == set(packable(adapt(model).blocks))


@needs_mkl
def test_engines_of_one_model_share_the_copies_until_the_last_is_closed(small: None) -> None:
    model = tiny("llama")
    hooks = adapt(model).hooks
    first, second = Engine(model, pack_weights=True), Engine(model, pack_weights=True)
    kept = hooks._packed
    assert [forward.layer for forward in kept] == packable(adapt(model).blocks)  # once
    first.close()
    assert hooks._packed is kept
    first.close()  # again: it has given up its part already
    second(**inputs_for("llama", 12))
    second.close()
    assert not hooks._packed


@needs_mkl
def test_weights_written_to_are_noticed(small: None) -> None:
    model = tiny("llama")
    with Engine(model, pack_weights=True) as engine:
        engine(**inputs_for("llama", 12))
        packable(adapt(model).blocks)[0].weight.data.zero_()
        with pytest.raises(ModelChanged, match="has changed"):
            engine(**inputs_for("llama", 12))


@needs_mkl
def test_an_engine_beside_one_of_earlier_weights_has_its_own_copies(small: None) -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12)
    with Engine(model, pack_weights=True):
        with torch.no_grad():
            for layer in packable(adapt(model).blocks):
                layer.weight.mul_(1.1)
            alone = model(**inputs).logits
        with Engine(model, pack_weights=True) as second:
            called = second(**inputs, logits="all").logits
    torch.testing.assert_close(called, alone, rtol=1e-4, atol=1e-4)


class Larger(torch.overrides.TorchFunctionMode):
    """Products of linear layers, a tenth larger."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        return 1.1 * result if func is F.linear else result


@pytest.mark.parametrize("packs", [pytest.param(True, marks=needs_mkl), False])
@pytest.mark.parametrize("patched", ["class", "function", "mode"])
def test_what_linear_layers_were_patched_to_is_what_runs(
    small: None, monkeypatch: pytest.MonkeyPatch, packs: bool, patched: str
) -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12)
    forward, linear = nn.Linear.forward, F.linear
    mode = Larger() if patched == "mode" else contextlib.nullcontext()
    if patched == "class":
        monkeypatch.setattr(nn.Linear, "forward", lambda *given: 1.1 * forward(*given))
    elif patched == "function":
        monkeypatch.setattr(F, "linear", lambda *given: 1.1 * linear(*given))
    with torch.no_grad(), mode, Engine(model, pack_weights=packs) as engine:
        alone = model(**inputs).logits
        called = engine(**inputs, logits="all").logits
    torch.testing.assert_close(called, alone, rtol=1e-4, atol=1e-4)


@needs_mkl
def test_a_copy_made_during_a_call_computes_the_same(small: None) -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12)
    hooks = adapt(model).hooks
    hooks.pack()
    with torch.no_grad():
        alone = model(**inputs).logits
        with adapt(model).installed():
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            torch.testing.assert_close(model(**inputs).logits, alone, rtol=1e-4, atol=1e-5)
        hooks.unpack()
        for other in copies:
            assert torch.equal(other(**inputs).logits, alone)
            packable(other.model.layers)[0].weight.zero_()
            assert not torch.equal(other(**inputs).logits, alone)


def test_what_cannot_be_packed_is_refused() -> None:
    model = tiny("llama")  # its layers are too small to be worth it
    with pytest.raises(ValueError, match="pack_weights: expected layers of fp32"):
        Engine(model, pack_weights=True)
    with Engine(model):
        assert adapt(model).hooks.packed_bytes == 0


@needs_mkl
@pytest.mark.parametrize("packs", [True, False])
def test_ranks_share_the_copies(small: None, packs: bool) -> None:
    model = tiny("llama")

    def work(mesh: Mesh) -> bool:
        with Engine(model, mesh=mesh, pack_weights=packs) as engine:
            engine(**inputs_for("llama", 12))
            return adapt(model).hooks.packed_bytes > 0

    assert run_ranks(3, work) == [packs] * 3
    assert adapt(model).hooks.packed_bytes == 0


def test_the_kernel_says_how_much_memory_is_free() -> None:
    assert available_bytes() > 1 << 20
