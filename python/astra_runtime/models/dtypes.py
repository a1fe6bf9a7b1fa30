"""Refusing a model whose parts have dtypes that do not fit together, before anything is sent.

Most models have one dtype, and of many that mix them the mixture is meant: norms in fp32, layers of
integers, a head that casts what it reads. So where weights differ, the model itself is asked, by a
pass over one token on this rank alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelChanged
from .base import Adapter
from .quantized import QuantizedEmbedding, QuantizedLinear


class _Dtypes:
    """A listener that lets the model compute what it would, and notes what ranks would exchange."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.dtype] = {}

    def embedded(self, hidden: Tensor) -> Tensor:
        return hidden

    def before_block(self, block: int, hidden: Tensor) -> None:
        pass

    def attend(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor | None:
        for name, tensor in (("queries", query), ("keys", key), ("values", value)):
            self.seen[f"{name} of block {block}"] = tensor.dtype
        return None

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden


@torch.no_grad()
def check_dtypes(adapter: Adapter, inputs: Mapping[str, Any]) -> None:
    """Runs a model that mixes dtypes once, for `inputs` that say nothing.

    Raises:
        ValueError: its parts do not work together, or its attention has another dtype than the
            codes that it is given.
    """
    different = _different(adapter.model)
    if different is None:
        return
    name, got, usual = different
    advice = f"convert the model with model.to({usual})"
    listener = _Dtypes()
    try:
        with adapter.listening(listener):
            adapter.model(**inputs)
    except ModelChanged:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"model: expected {usual} in {name}, as in most weights, or parts that work "
            f"together, got {got} ({_first_line(error)}); {advice}"
        ) from error
    for what, seen in listener.seen.items():
        if seen != adapter.dtype:
            raise ValueError(
                f"model: expected {what} in {adapter.dtype}, as attention's weights are, got "
                f"{seen}; {advice}"
            )


def _different(model: nn.Module) -> tuple[str, torch.dtype, torch.dtype] | None:
    """The first floating-point weight that has not the dtype of most, its dtype and theirs; None:
    they have one. Layers of integers take any, whatever their scales have."""
    weights = {
        f"{path}.{name}".lstrip("."): parameter.dtype
        for path, module in model.named_modules()
        if not isinstance(module, QuantizedLinear | QuantizedEmbedding)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    }
    if len(set(weights.values())) < 2:
        return None
    ((usual, _),) = Counter(weights.values()).most_common(1)
    name = next(name for name, dtype in weights.items() if dtype != usual)
    return name, weights[name], usual


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
