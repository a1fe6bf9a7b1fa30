"""What modules have in place of their own `forward`, for the time of a call and no longer."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class CallForward:
    """A module's `forward` during calls: the same function, computed faster.

    Hooks on the module run as ever, and a `forward` that somebody set on it stays. What a copy of
    the model made during a call has in its place is the module's own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.own(*given, **named)

    def own(self, *given: Any, **named: Any) -> Any:
        """What the module's class computes."""
        return type(self.module).forward(self.module, *given, **named)

    def put(self) -> None:
        """Into the module, unless it has a forward of somebody's."""
        self.module.__dict__.setdefault("forward", self)

    def take(self) -> None:
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> CallForward:
        return CallForward(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> Any:
        return CallForward, (self.module,)


def set_forward(module: nn.Module) -> Any:
    """The `forward` that somebody has set on a module, none of ours; None: its class's runs."""
    forward = module.__dict__.get("forward")
    return None if isinstance(forward, CallForward) else forward
