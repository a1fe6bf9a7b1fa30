"""Noticing that a model's weights are no longer those that an engine was made with.

Tables are made from weights once, when an engine is made. Whoever merges an adapter, loads other
weights or converts the model afterwards would get answers of two models mixed. So a call begins
with a look at the configuration, at every module, whether it is the one that was there, and at
every parameter and buffer: whether it is the same tensor at the same address, and by torch's
version counter whether anybody has written to it; on a CPU also a sample of its bits, since a write
through `.data` leaves no other trace. The look takes about a microsecond a parameter. What modules
compute with besides (`constants`), such as attention's scale or an activation function, has to be
what it was. Where tables were made from a module, a later hook or patch of it counts as well, and
of an adapter whether it is switched on. A codebook's tensors are looked at as the model's are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelChanged
from .constants import numbers_of
from .digest import is_beside_the_function
from .during_calls import set_forward
from .own_hooks import unwatched

SAMPLE = 8  # values of a tensor, evenly spaced
_GATHERING = "transformers.utils.output_capturing"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


class Watch:
    """The modules, parameters and buffers of `model` as they are now; `changed` names the first
    that is different.

    tabled: modules of the model that tables were made from. codebook: its tensors, by name.

    Attributes:
        modules: those of the model by path; `changed` tells where it has others.
    """

    def __init__(
        self,
        model: nn.Module,
        tabled: Iterable[nn.Module] = (),
        codebook: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.modules = list(model.named_modules())
        self._modules = [
            (path or "the model", module, list(module._modules.values()))
            for path, module in self.modules
        ]
        self._tabled = [(module, _function(module)) for module in tabled]
        self._config: Any = model.config
        self._words = _words(self._config)
        self._numbers = numbers_of(model)
        self._slots: list[tuple[dict[str, Any], str, Tensor]] = []
        self._names: list[str] = []
        self._owners: list[tuple[dict[str, Any], int, str]] = []  # with how many tensors
        for prefix, module in model.named_modules():
            for slots in (module._parameters, module._buffers):
                before = len(self._slots)
                for name, tensor in slots.items():
                    if tensor is not None:
                        self._slots.append((slots, name, tensor))
                        self._names.append(f"{prefix}.{name}".lstrip("."))
                # a layer without a bias may get one; modules may make buffers when they want them
                if slots and slots is module._parameters:
                    self._owners.append((slots, len(self._slots) - before, prefix))
        coded = dict(codebook or {})
        self._slots += [(coded, name, tensor) for name, tensor in coded.items()]
        self._names += [f"the codebook's {name}" for name in coded]
        self._addresses = self._places()
        self._versions = self._counters()
        self._samples = [_sample(tensor) for _, _, tensor in self._slots if tensor.is_cpu]
        self._values = [sample.copy() for sample in self._samples]
        self._joined = self._read()

    def check(self) -> None:
        """Raises ModelChanged unless the model is the one whose digest the ranks agreed on."""
        changed = self.changed()
        if changed is not None:
            raise ModelChanged(
                f"{changed} has changed since this engine was made; close the engine and make "
                "another"
            )

    def changed(self) -> str | None:
        """What was replaced, moved, converted or written to, by name; None: nothing."""
        changed = self._changed_module()
        if changed is not None:
            return changed
        for (slots, name, tensor), path in zip(self._slots, self._names, strict=True):
            if slots.get(name) is not tensor:
                return path
        for slots, count, path in self._owners:
            if len(slots) != count and sum(t is not None for t in slots.values()) != count:
                return f"the number of parameters in {path or 'the model'}"
        now = self._places()
        if now != self._addresses:
            return self._first(a != b for a, b in zip(now, self._addresses, strict=True))
        versions = self._counters()
        if versions != self._versions:
            return self._first(a != b for a, b in zip(versions, self._versions, strict=True))
        if not np.array_equal(self._read(), self._joined):
            pairs = iter(zip(self._samples, self._values, strict=True))
            return self._first(
                tensor.is_cpu and not np.array_equal(*next(pairs)) for _, _, tensor in self._slots
            )
        return None

    def _changed_module(self) -> str | None:
        now = _words(self._config)
        if now != self._words:
            names = sorted(now.keys() | self._words.keys())
            name = next(n for n in names if now.get(n) != self._words.get(n))
            return f"{name} of the model's configuration"
        for path, module, children in self._modules:
            now = module._modules
            if not now and not children:
                continue
            if len(now) != len(children) or not all(map(operator.is_, now.values(), children)):
                return f"a module in {path}"
        for module, function in self._tabled:
            if _function(module) != function:
                path = next(path for path, known, _ in self._modules if known is module)
                return f"what {path} computes, by a hook, a patch or its epsilon,"
        for path, attributes, name, value in self._numbers:
            given = attributes.get(name)
            if given is not value and (isinstance(given, Tensor) or given != value):
                return path
        return None

    def _first(self, differ: Any) -> str:
        """The name of the first parameter that differs."""
        return next(name for name, other in zip(self._names, differ, strict=False) if other)

    def _places(self) -> list[int]:
        return [tensor.data_ptr() for _, _, tensor in self._slots]

    def _counters(self) -> list[int]:
        # inference tensors keep no version counter, and cannot be written to either
        tensors = (tensor for _, _, tensor in self._slots)
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]

    def _read(self) -> Any:
        """The bytes of all samples, side by side."""
        if not self._samples:
            return np.empty(0, np.uint8)
        return np.concatenate(self._samples, axis=None)


def _words(config: Any) -> dict[str, Any]:
    """What a configuration says of the function, some of which is read in every pass."""
    return {
        name: _frozen(value)
        for name, value in vars(config).items()
        if not (name.startswith("_") or is_beside_the_function(name))
    }


class _Itself:
    """Stands for an object of which nothing is known, a tensor of class weights for example: any
    other one is another word."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    __hash__ = object.__hash__


def _frozen(value: Any) -> Any:
    """What is equal as long as `value` says the same, and does not change with it."""
    if isinstance(value, int | float | str | torch.dtype | None):
        return value
    if isinstance(value, dict):
        return {name: _frozen(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, set | frozenset):
        return frozenset(value)
    if type(value).__module__.startswith("transformers.") and hasattr(value, "to_dict"):
        return _words(value)  # the configuration of a part
    return _Itself(value)


def _function(module: nn.Module) -> tuple[Any, ...]:
    """What tells, besides its parameters, which function a module computes."""
    return (
        type(module),
        _changing(module._forward_hooks),
        _changing(module._forward_pre_hooks),
        set_forward(module),
        getattr(module, "eps", None),
        getattr(module, "variance_epsilon", None),
        None if _is_fixed(module) else _settings(module),
    )


def _changing(hooks: Mapping[int, Any]) -> tuple[Any, ...]:
    """A module's hooks, but for those by which transformers gathers hidden states and attentions,
    which it puts there when they are asked for."""
    own = map(unwatched, hooks.values())
    return tuple(hook for hook in own if getattr(hook, "__module__", "") != _GATHERING)


def _is_fixed(module: nn.Module) -> bool:
    """Whether nothing but its parameters and epsilon says what a module computes."""
    kind = type(module)
    return kind.__module__.startswith(("torch.nn.", "transformers.", "astra_runtime."))


def _settings(module: nn.Module) -> str:
    """What an adapter that somebody put into a model says of itself: switched on or off, scaled."""
    return repr(
        [
            (name, value)
            for part in module.modules()
            for name, value in vars(part).items()
            if isinstance(value, bool | int | float | str | tuple | list)
            or (isinstance(value, dict) and not name.startswith("_"))
            if name != "training"
        ]
    )


def _sample(tensor: Tensor) -> Any:
    """The bits of evenly spaced values, as a view: it shows what is written to the tensor later."""
    if not tensor.is_contiguous() or tensor.dtype.is_complex or tensor.is_quantized:
        return np.empty(0, np.int64)
    flat = tensor.detach().view(-1)
    few = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]
    return few.view(_BITS[tensor.dtype.itemsize]).numpy()
