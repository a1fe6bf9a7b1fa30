"""The small steps of a block, each in one pass over memory, for the time of a call.

Norms, the gate of the MLP and rotary positions are an eighth of a small Llama's time on one core,
because torch computes them in four to eight passes each (`astra_kernels/_elementwise`); so is
GPT-2's GELU. Their modules get a `forward` that computes the same, where the class is transformers'
own, unchanged: what was patched is what runs. On a GPU they are one kernel each, rounded where the
class's formula rounds. Other dtypes and devices go by that formula.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astra_kernels import _direct as direct
from astra_kernels._elementwise import gated_silu, native, on_gpu, rms_norm, rotate

from .during_calls import CallForward
from .own_hooks import hooks_of_all
from .projection import RMS_NORMS, is_plain
from .quantized import QuantizedLinear

_GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
_ROTARY = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
_NORMED = ("Qwen3Attention",)  # each head's queries and keys, before they rotate
_GELU = ("NewGELUActivation",)
_ROTATION = "apply_rotary_pos_emb"
_OF_INTEGERS = QuantizedLinear.forward
_CACHES = ("cache", "past_key_values")  # as transformers calls it since 5.24, and before


def fused_forwards(
    modules: Iterable[nn.Module],
    attention: Callable[..., Any],
    is_running: Callable[[], bool],
    has_listener: Callable[[nn.Module], bool],
) -> list[CallForward]:
    """The forwards of those modules that have one.

    Args:
        attention: what attention modules call, see transformers' AttentionInterface.
        is_running: whether a call is under way in this thread; the model's own pass in another one
            meanwhile is left alone.
        has_listener: whether this attention module is a part of it.
    """
    found: list[CallForward] = []
    for module in modules:
        name = type(module).__name__
        if not _is_transformers(type(module)) or not _is_transformers(type(module).forward):
            continue
        if name in RMS_NORMS:
            found.append(_Norm(module, is_running))
        elif name in _GELU:
            found.append(_Gelu(module, is_running))
        elif name in _GATED:
            found.append(_Gate(module, is_running))
        elif name in _ROTARY and _is_transformers(_rotation_of(module)):
            found.append(_Attention(module, is_running, attention, has_listener))
    return found


def _is_transformers(code: Any) -> bool:
    return str(getattr(code, "__module__", "")).startswith("transformers.")


def _rotation_of(module: nn.Module) -> Any:
    return getattr(sys.modules[type(module).__module__], _ROTATION, None)


class _Fused(CallForward):
    def __init__(self, module: nn.Module, is_running: Callable[[], bool]) -> None:
        super().__init__(module)
        self._of_class, self._is_running = type(module).forward, is_running

    def _serves(self) -> bool:
        """In a call, where the class still computes what it did."""
        unchanged = type(self.module).forward is self._of_class
        return unchanged and self._is_running() and not torch.compiler.is_compiling()


class _Norm(_Fused):
    def __call__(self, *given: Any, **named: Any) -> Any:
        norm: Any = self.module
        if len(given) != 1 or named or not self._serves():
            return self.own(*given, **named)
        return rms_norm(given[0], norm.weight, norm.variance_epsilon)


class _Gelu(_Fused):
    """GELU by a hyperbolic tangent, 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), as torch has it."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        if len(given) == 1 and not named and self._serves() and native.can_run(given[0]):
            return F.gelu(given[0], approximate="tanh")
        return self.own(*given, **named)


class _Gate(_Fused):
    def __call__(self, *given: Any, **named: Any) -> Any:
        mlp: Any = self.module
        if len(given) != 1 or named or not self._serves() or not _is_silu(mlp.act_fn):
            return self.own(*given, **named)
        gate, up = _projected(given[0], mlp.gate_proj, mlp.up_proj)
        return mlp.down_proj(gated_silu(gate, up))


def _projected(vectors: Tensor, *layers: nn.Module) -> tuple[Any, ...]:
    """What each of several linear layers makes of them; layers of integers round them once."""
    plain = all(is_plain(layer, QuantizedLinear) for layer in layers) and not hooks_of_all()
    if plain and QuantizedLinear.forward is _OF_INTEGERS:
        found = direct.quantized_linears(vectors, layers)
        if found is not None:
            return found
    return tuple(layer(vectors) for layer in layers)


def _window(module: Any) -> dict[str, Any]:
    """The sliding window that such a module hands to its attention: of its own or, in Mistral, of
    its configuration."""
    if type(module).__name__ == "LlamaAttention":
        return {}
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return {"sliding_window": window}


def _is_silu(module: nn.Module) -> bool:
    from transformers.activations import SiLUActivation

    return is_plain(module, nn.SiLU, SiLUActivation) and not hooks_of_all()


class _Attention(_Fused):
    def __init__(
        self,
        module: nn.Module,
        is_running: Callable[[], bool],
        attention: Callable[..., Any],
        has_listener: Callable[[nn.Module], bool],
    ) -> None:
        super().__init__(module, is_running)
        self._attention, self._has_listener = attention, has_listener
        self._rotation = _rotation_of(module)

    def __call__(self, *given: Any, **named: Any) -> Any:
        angles = named.get("position_embeddings")
        hidden = named.get("hidden_states")
        if given or hidden is None or angles is None or not self._takes(hidden, angles, named):
            return self.own(*given, **named)
        kept = ("hidden_states", "position_embeddings", "attention_mask", *_CACHES)
        others = {name: value for name, value in named.items() if name not in kept}
        module: Any = self.module
        query, key, value = (
            projected.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for projected in _projected(hidden, module.q_proj, module.k_proj, module.v_proj)
        )
        if type(module).__name__ in _NORMED:
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = rotate(query, *angles), rotate(key, *angles)
        out, weights = self._attention(
            module,
            query,
            key,
            value,
            named.get("attention_mask"),
            dropout=0.0,
            scaling=module.scaling,
            **(_window(module) | others),
        )
        return module.o_proj(out.flatten(2)), weights

    def _takes(self, hidden: Tensor, angles: Any, named: dict[str, Any]) -> bool:
        return (
            self._serves()
            and self._has_listener(self.module)
            and not self.module.training
            and _rotation_of(self.module) is self._rotation
            and all(named.get(name) is None for name in _CACHES)
            and (native.can_run(hidden, *angles) or on_gpu(hidden, *angles))
        )
