"""Numbers that modules compute with beside their parameters, which no digest of weights covers.

Attention's scale, a norm's epsilon, rotary angles and activation functions are made from the
configuration when a model is, and belong to its modules from then on. Whoever sets them anew on one
rank alone has the ranks run two models together. So those that are not what the configuration says
are compared between ranks, and a number that changes while an engine is open is noticed.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NUMBERS = ("scaling", "eps", "variance_epsilon", "attention_scaling", "sliding_window")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")  # of configurations
_FIXED = ("torch.", "transformers.")  # modules that compute what their class says
# What an adapter that somebody put into a model says of itself.
_OF_ADAPTERS = ("scaling", "_disable_adapters", "_active_adapter")
# Where blocks and heads of these families keep their activation function.
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "intermediate_act_fn", "transform_act_fn")
_NAMED = 3  # of the numbers that differ; a checksum covers all of them
_CLOSE = 1e-4  # relative: how alike devices compute angles
# What modules of torch and transformers say of themselves and no pass in evaluation reads.
_BESIDE = frozenset(
    ("training", "gradient_checkpointing", "name_or_path", "loss_type", "in_features")
    + ("out_features", "num_embeddings", "embedding_dim", "p")
)

Slot = tuple[str, dict[str, Any], str, Any]  # path, and where the number is: attributes[name]


def numbers_of(model: nn.Module) -> list[Slot]:
    """What a model's modules compute with beside their parameters, as it is now: numbers, words and
    activation functions. Of classes that are somebody's own it is `NUMBERS` and functions alone, as
    others may change by themselves."""
    return [
        (f"{path}.{name}".lstrip("."), vars(module), name, value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if _is_computed_with(module, name, value)
    ]


def _is_computed_with(module: nn.Module, name: str, value: Any) -> bool:
    if name in _ACTIVATIONS:
        return callable(value)
    if name in NUMBERS:
        return isinstance(value, int | float | None)
    if name in _BESIDE or name.startswith("_") or name.endswith("dropout"):
        return False
    plain = isinstance(value, int | float | str | None)  # a bool is an int
    return plain and type(module).__module__.startswith(_FIXED)


def other_numbers(model: Any, scales: Mapping[nn.Module, float], rotary: nn.Module | None) -> str:
    """The numbers that are not what the configuration says, with their values; "": there are none.

    Args:
        scales: what the scale of each attention module is by the configuration.
        rotary: the module that makes rotary angles, if there is one.
    """
    config = model.config
    epsilons = [getattr(config, name) for name in _EPSILONS if hasattr(config, name)]
    fresh = None if rotary is None else _made_anew(rotary, config)
    found = [] if fresh is None else _other_angles(rotary, fresh)
    for path, module in model.named_modules():
        expected: dict[str, list[Any]] = {"eps": epsilons, "variance_epsilon": epsilons}
        if module in scales:
            expected["scaling"] = [scales[module]]
        elif not type(module).__module__.startswith(_FIXED):
            expected |= {name: [] for name in _OF_ADAPTERS}
        for name, values in expected.items():
            own = vars(module).get(name, values)
            if own is not values and not any(_alike(own, value) for value in values):
                found.append(f"{path}.{name}={_text(own)}".lstrip("."))
    return _joined(found + _other_activations(model))


def _other_activations(model: Any) -> list[str]:
    """Activation functions of torch and transformers that give other values than the configured."""
    from transformers.activations import ACT2FN

    words = (getattr(model.config, name, None) for name in ("hidden_act", "activation_function"))
    said = next((word for word in words if word in ACT2FN), None)
    if said is None:
        return []
    expected, found = ACT2FN[said], []
    places = torch.linspace(-3.0, 3.0, 25, dtype=torch.float32, device="cpu")
    for path, module in model.named_modules():
        for name in _ACTIVATIONS:
            own: Any = getattr(module, name, None)
            function = inspect.isroutine(own)
            # torch's own in C++ name no module
            home = own.__module__ or "torch." if function else type(own).__module__
            if not f"{home}.".startswith(_FIXED):
                continue
            if not torch.allclose(own(places), expected(places), atol=1e-2):
                said = own.__name__ if function else type(own).__name__
                found.append(f"{path}.{name}={said}".lstrip("."))
    return found


def _made_anew(rotary: nn.Module, config: Any) -> nn.Module | None:
    """The module as the configuration makes it; None where it is not transformers' own."""
    kind: Any = type(rotary)
    if not kind.__module__.startswith("transformers."):
        return None
    with torch.device("cpu"):
        made: nn.Module = kind(config)
    return made


def _other_angles(rotary: Any, fresh: Any) -> list[str]:
    own, made, found = rotary.inv_freq.detach().float().cpu(), fresh.inv_freq.float(), []
    if own.shape != made.shape or not torch.allclose(own, made, rtol=_CLOSE, atol=0.0):
        said = ",".join(f"{value:.3g}" for value in own.flatten().tolist())
        found.append(f"rotary frequencies of {zlib.crc32(said.encode()):08x}")
    if not _alike(rotary.attention_scaling, fresh.attention_scaling):
        found.append(f"rotary attention_scaling={_text(rotary.attention_scaling)}")
    return found


def _alike(value: Any, expected: Any) -> bool:
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return math.isclose(value, expected, rel_tol=1e-6)
    return value is expected


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.tolist()
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _joined(found: list[str]) -> str:
    if len(found) <= _NAMED:
        return ", ".join(found)
    checksum = zlib.crc32("\n".join(found).encode())
    return f"{', '.join(found[:_NAMED])} and {len(found) - _NAMED} more ({checksum:08x} in all)"
