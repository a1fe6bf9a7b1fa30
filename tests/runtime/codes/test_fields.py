"""Codebooks whose fields no fit has written, in files and made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from astra_runtime import Codebook, Engine

from ..models import book_of, tiny

BAD: dict[str, Any] = {
    "groups": 10**9,
    "codewords": 10**12,
    "prefix": -4,
    "shared": "yes",
    "geometry": [1],
    "model": 7,
}


@pytest.mark.parametrize("name", BAD)
def test_fields_that_no_fit_writes(name: str, tmp_path: Path) -> None:
    """A RuntimeError of the first call before, which ended the mesh."""
    model = tiny("llama")
    wrong = replace(book_of(model, "llama", groups=3, codewords=16), **{name: BAD[name]})
    with pytest.raises(ValueError, match="tables" if name == "groups" else name):
        Engine(model, wrong)
    wrong.save_pretrained(tmp_path)  # its digest fits
    with pytest.raises(ValueError, match="cannot be read: "):
        Codebook.from_pretrained(tmp_path)


def test_folders_that_are_no_paths() -> None:
    for call in (Codebook.dense().save_pretrained, Codebook.from_pretrained):
        with pytest.raises(TypeError, match="folder: expected a path, got int"):
            call(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("space", ["kv", "hidden", "transform"])
def test_codewords_that_are_not_finite(space: str, value: float) -> None:
    """They are never the nearest, so that answers were finite and nobody noticed."""
    model = tiny("llama")
    options = {"bits": 40} if space == "transform" else {"groups": 3 if space == "kv" else 2}
    book = book_of(model, "llama", space=space, codewords=16, held_back=0, **options)
    wrong = book.with_tables([_with(value, tables) for tables in book.block_tables])
    with pytest.raises(ValueError, match="finite"):
        Engine(model, wrong)


def _with(value: float, tables: torch.Tensor) -> torch.Tensor:
    changed = tables.clone()
    changed.view(-1)[:1] = value
    return changed
