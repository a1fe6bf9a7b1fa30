"""README's code runs: every Python block that `<!-- runs -->` stands before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"<!-- runs -->\n```python\n(.*?)```\n", README.read_text("utf-8"), re.DOTALL)


def test_no_mark_is_overlooked():
    assert len(BLOCKS) == README.read_text("utf-8").count("<!-- runs -->") > 0


@pytest.mark.parametrize("source", BLOCKS, ids=range(len(BLOCKS)))
def test_runs(source):
    """Each on its own, as a reader would paste it."""
    if "transformers" in source:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(source, str(README), "exec"), names)
    results = [
        names[name] for name in ("out", "logits") if isinstance(names.get(name), torch.Tensor)
    ]
    assert results
    for result in results:
        assert result.isfinite().all()
