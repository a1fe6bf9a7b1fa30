"""Hooks that somebody has put into a model, and whether they change anything."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Watched:
    """A hook of somebody's own, which notes during a call whether it changes anything."""

    def __init__(self, hook: Callable[..., Any], changing: dict[int, Any]) -> None:
        self.hook, self.changing = hook, changing

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        tensors = list(_tensors(given))
        before = _versions(tensors)
        result = self.hook(module, *given)
        if result is not None or before is None or _versions(tensors) != before:
            self.changing[id(self.hook)] = self.hook
        return result

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.hook, memo)

    def __reduce__(self) -> Any:
        return unwatched, (self.hook,)


def hooks_of_all() -> tuple[Any, ...]:
    """Those that torch calls for the modules of every model."""
    module = nn.modules.module
    before, behind = module._global_forward_pre_hooks, module._global_forward_hooks
    return (*before.values(), *behind.values())


def unwatched(hook: Any) -> Any:
    return hook.hook if isinstance(hook, Watched) else hook


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Mapping):
        yield from _tensors(tuple(given.values()))
    elif isinstance(given, tuple | list):
        for part in given:
            yield from _tensors(part)


def _versions(tensors: Sequence[Tensor]) -> list[int] | None:
    """What counts the writes to them; None: they have no count, as in inference mode."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [tensor._version for tensor in tensors]
