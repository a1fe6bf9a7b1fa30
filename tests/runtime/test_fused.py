"""Norms, gates, GELU and rotary positions in one pass, during calls: the model's own function."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import nn

from astra_kernels._elementwise import native
from astra_runtime import Engine
from astra_runtime.models import adapt, attention, fused

from .models import inputs_for, tiny

KINDS = ("llama", "mistral", "qwen2", "qwen3")
PARTS = (fused._Norm, fused._Gate, fused._Attention)


class Runs:
    """How often each kind of forward ran C++, counted where it is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of = dict.fromkeys(("rms_norm", "gated_silu", "rotate"), 0)
        for name in self.of:
            monkeypatch.setattr(native, name, self._counted(name))

    def _counted(self, name: str) -> Any:
        own = getattr(native, name)

        def counted(*given: Any) -> Any:
            self.of[name] += 1
            return own(*given)

        return counted


def placed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_answers_as_the_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(kind), inputs_for(kind, 24, batch=2)
    alone = model(**inputs).logits.detach()
    with Engine(model) as engine:
        runs = Runs(monkeypatch)
        called = engine(**inputs, logits="all").logits
        # 3 blocks of two norms, one gate and a rotation of queries and of keys; the last norm.
        # Qwen3 has one more norm of each.
        assert runs.of["rms_norm"] == (13 if kind == "qwen3" else 7)
        assert runs.of["gated_silu"] == 3
        assert runs.of["rotate"] >= 6
        assert not placed(model)
    torch.testing.assert_close(called, alone, rtol=1e-4, atol=5e-5)


def test_gelu_of_gpt2_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny("gpt2"), inputs_for("gpt2", 24)
    alone = model(**inputs).logits.detach()
    runs, own = [], torch.nn.functional.gelu
    with Engine(model) as engine:
        counted = lambda x, **how: runs.append(how) or own(x, **how)  # noqa: E731
        monkeypatch.setattr(torch.nn.functional, "gelu", counted)
        called = engine(**inputs, logits="all").logits
    assert runs == 3 * [{"approximate": "tanh"}]
    torch.testing.assert_close(called, alone, rtol=1e-4, atol=5e-5)


def test_half_precision_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny("llama").bfloat16(), inputs_for("llama", 24)
    with Engine(model) as engine:
        runs = Runs(monkeypatch)
        engine(**inputs)
    assert not any(runs.of.values())


def test_hooks_inside_still_run_and_what_is_somebody_elses_is_kept() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    block = model.model.layers[1]
    block.mlp.act_fn.register_forward_hook(lambda module, args, out: 2 * out)
    block.mlp.gate_proj.register_forward_hook(lambda module, args, out: 0.5 * out)
    block.self_attn.q_proj.register_forward_hook(lambda module, args, out: 1.5 * out)
    block.input_layernorm.register_forward_hook(lambda module, args, out: out + 0.25)
    model.model.layers[2].mlp.act_fn = nn.Tanh()
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda x: 3 * type(norm).forward(norm, x)
    alone = model(**inputs).logits.detach()
    with Engine(model) as engine:
        called = engine(**inputs, logits="all").logits
    torch.testing.assert_close(called, alone, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("name", ["LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"])
def test_a_class_or_function_that_was_patched_is_what_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As packages of kernels do, before an engine is made or after."""
    model, inputs = tiny("llama"), inputs_for("llama", 24)
    module = sys.modules[type(model).__module__]
    code = getattr(module, name)
    with Engine(model) as engine:
        engine(**inputs)
        if name == "apply_rotary_pos_emb":
            monkeypatch.setattr(module, name, lambda q, k, cos, sin: code(2 * q, k, cos, sin))
        else:
            own = code.forward
            monkeypatch.setattr(code, "forward", lambda self, x: 0.5 * own(self, x))
        alone = model(**inputs).logits.detach()
        with Engine(model) as another:
            called = another(**inputs, logits="all").logits
        torch.testing.assert_close(called, alone, rtol=1e-4, atol=5e-5)


def test_a_copy_made_during_a_call_computes_the_same() -> None:
    model, inputs = tiny("llama"), inputs_for("llama", 12)
    alone = model(**inputs).logits.detach()
    with Engine(model), adapt(model).installed():
        assert {type(module.__dict__["forward"]) for module in placed(model)} == set(PARTS)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        # the model's own pass meanwhile, which no engine hears of
        torch.testing.assert_close(model(**inputs).logits, alone, rtol=1e-4, atol=5e-5)
    for other in copies:
        assert torch.equal(other(**inputs).logits, alone)
        other.model.norm.weight.data.zero_()
        assert not torch.equal(other(**inputs).logits, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_listener_leaves_to_the_model_is_its_own_attention(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that the module's own forward hands over."""
    model, inputs = tiny(kind), inputs_for(kind, 24) | {"use_cache": False}
    given: list[set[str]] = []

    class Listens:
        def before_block(self, block: int, hidden: torch.Tensor) -> None: ...

        def attend(self, *given: Any) -> None: ...

        def finish(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    with torch.no_grad():
        alone = model(**inputs).logits
        Engine(model).close()
        own = attention.own_attention

        def noted(module: nn.Module) -> Any:
            return lambda *args, **named: given.append(set(named)) or own(module)(*args, **named)

        monkeypatch.setattr(attention, "own_attention", noted)
        with adapt(model).listening(Listens()):
            runs = Runs(monkeypatch)
            torch.testing.assert_close(model(**inputs).logits, alone, rtol=1e-4, atol=5e-5)
        assert runs.of["rotate"] == 6
        fused_gives, given[:] = given[0], []
        monkeypatch.setattr(native, "can_run", lambda *tensors: False)
        with adapt(model).listening(Listens()):
            torch.testing.assert_close(model(**inputs).logits, alone)
    assert fused_gives == given[0]
