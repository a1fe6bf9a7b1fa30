"""What is recorded of a model on calibration windows."""

from __future__ import annotations

import pytest
import torch

from astra_runtime.codes.layouts import merge_heads
from astra_runtime.models import adapt
from astra_runtime.train.calibration import as_windows, empty_pairs, record, record_pairs

from ..models import tiny, windows_for


@pytest.mark.parametrize(("kind", "prefix"), [("llama", 1), ("gpt2", 0), ("vit", 0), ("bert", 0)])
def test_pairs_written_in_place_are_those_recorded(kind: str, prefix: int) -> None:
    model = tiny(kind)
    adapter = adapt(model)
    windows = as_windows(windows_for(kind)[:3])
    seen: list[tuple[str, int, int]] = []
    rows, parts = empty_pairs(adapter, windows, prefix)
    record_pairs(adapter, windows, lambda *step: seen.append(step), prefix, parts)
    recorded = record(adapter, False, windows, lambda *step: None, prefix)
    for block, found in enumerate(rows):
        pairs = [merge_heads(key, value).flatten(0, 1) for key, value in recorded.take(block)]
        assert torch.equal(found, torch.cat(pairs))
    assert seen[-1] == ("calibrating", 3, 3)


def test_activations_that_are_not_finite_are_named() -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[5] = float("inf")
    windows = as_windows([torch.tensor([3, 4, 5, 6])])
    _, parts = empty_pairs(adapt(model), windows)
    with pytest.raises(ValueError, match="not finite on the calibration data"):
        record_pairs(adapt(model), windows, lambda *step: None, 0, parts)
