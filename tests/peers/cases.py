"""A case, its outcome, and the slow formula that it is compared with."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

OWN, TORCH, REFUSED = "own op", "torch's op", "refused"
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


@dataclass(frozen=True)
class Case:
    """`run` raises AssertionError where a number is wrong.

    Attributes:
        feature: the row of the table.
        refusal: the words in which the case is refused; None: it has to be right.
    """

    feature: str
    name: str
    run: Callable[[], None]
    refusal: str | None = None


@contextmanager
def torch_calls() -> Iterator[list[int]]:
    """Counts what `scaled_dot_product_attention` hands over to torch's own."""
    module = importlib.import_module("astra_kernels.scaled_dot_product_attention")
    calls: list[int] = []
    given = module.torch_sdpa

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return given(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch_sdpa", counted)
        yield calls


def outcome(case: Case) -> str:
    """How the case ended; whatever is neither right nor refused in its words is raised."""
    torch.manual_seed(0)
    with torch_calls() as calls:
        if case.refusal is not None:
            with pytest.raises(REFUSALS, match=case.refusal):
                case.run()
            return REFUSED
        try:
            case.run()
        except Exception as error:
            raise AssertionError(f"{case.feature}: {case.name}") from error
    return TORCH if calls else OWN


def count(cases: Iterable[Case]) -> dict[str, dict[str, int]]:
    """By feature: cases by outcome."""
    found: dict[str, Counter[str]] = {}
    for case in cases:
        found.setdefault(case.feature, Counter())[outcome(case)] += 1
    return {feature: dict(counter) for feature, counter in found.items()}


def close(found: Tensor, want: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Equal up to what `dtype` rounds."""
    tolerance = TOLERANCE[dtype] * factor
    torch.testing.assert_close(found.double(), want.double(), atol=tolerance, rtol=tolerance)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one softmax in float64, [B, H, M, d] over [B, Hkv, L, d]."""
    heads = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return weights[..., : key.shape[2]] @ value, lse


def band(rows: int, tokens: int, left: int = -1, right: int = -1) -> Tensor:
    """bool [rows, tokens] around the bottom-right diagonal; -1: no limit."""
    distance = torch.arange(tokens) - (torch.arange(rows)[:, None] + tokens - rows)
    seen = torch.ones(rows, tokens, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen
