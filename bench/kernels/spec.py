"""What a case of the kernels' benchmark consists of: its calls, its names, its roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.kernels.ceilings import Ceilings
from bench.kernels.timing import Call

Shape = Mapping[str, Any]

# What a case's shape says in the result file; d of encoding is the width of a group, D / groups.
SHAPE_KEYS = ("B", "M", "N", "H", "Hkv", "d", "K", "S", "T", "groups")

BITS = 10  # of a packed code, so that K is 1024


@dataclass(frozen=True)
class Calls:
    """The calls of a case, and how their results are checked.

    Attributes:
        ours, baselines: what is timed, by name.
        error: relative error of a call's result, against float64 or an exact reference; that of
            ours may be twice the best baseline's, and `slack`.
        whole: picks the tensor that must also be near the best baseline's everywhere (`error` may
            look at some rows only).
        not_comparable: baselines whose result is another thing, so that they are timed only.
        not_captured: baselines that cannot be captured into a CUDA graph, as they synchronize.
        reference: a comparable result, where no baseline gives one.
        notes: what else the case's entry in the file says.
    """

    ours: Mapping[str, Call]
    baselines: Mapping[str, Call]
    error: Callable[[Any], float]
    slack: float = 0.0
    whole: Callable[[Any], torch.Tensor] | None = None
    not_comparable: frozenset[str] = frozenset()
    not_captured: frozenset[str] = frozenset()
    reference: Call | None = None
    notes: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True)
class Spec:
    """A shape and what is measured on it.

    Attributes:
        variants: {impl: name of the case}; `build` gives a call of ours for every impl.
        roofline: seconds, from the shape and what the device can do.
        gathered: bytes of table rows and angles that a kernel reads which looks codes up in its
            loop, whatever else it does.
    """

    family: str
    shape: Shape
    dtype: torch.dtype
    variants: Mapping[str, str]
    roofline: Callable[[Shape, Ceilings], float]
    build: Callable[[Shape, torch.dtype, torch.device], Calls]
    notes: Mapping[str, Any] = field(default_factory=dict)
    gathered: Callable[[Shape], float] | None = None

    def roofline_ms(self, ceilings: Ceilings) -> float:
        return self.roofline(self.shape, ceilings) * 1e3
