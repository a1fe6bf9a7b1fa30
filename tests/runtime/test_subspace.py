"""Codewords in few dimensions: the same nearest ones, found for less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import astra_kernels as ak
from astra_runtime import Codebook
from astra_runtime.costs import costs_of
from astra_runtime.models import adapt
from astra_runtime.subspace import Search, Subspace, default_dimensions, search_macs

from .models import tiny, windows_for


def flat_tables(groups: int, codewords: int, width: int, dimensions: int) -> torch.Tensor:
    """Codewords [C, K, w] around a mean, in a subspace."""
    axes = torch.randn(groups, dimensions, width)
    return torch.randn(groups, codewords, dimensions) @ axes + torch.randn(groups, 1, width)


@pytest.mark.parametrize(("groups", "codewords", "width", "r"), [(1, 300, 96, 8), (3, 64, 40, 16)])
def test_the_search_finds_the_nearest_codeword(
    groups: int, codewords: int, width: int, r: int
) -> None:
    tables = flat_tables(groups, codewords, width, r)
    vectors = 3 * torch.randn(2, 50, groups, width)
    codes = Search(tables, r)(vectors)
    assert codes.shape == (2, 50, groups)
    assert codes.dtype == torch.int32
    table = tables.double()[:, None]
    distance = (vectors.double().flatten(0, 1).transpose(0, 1)[:, :, None] - table).norm(dim=-1)
    found = distance.gather(-1, codes.flatten(0, 1).T[..., None].long())[..., 0]  # [C, n]
    torch.testing.assert_close(found, distance.amin(-1), rtol=1e-5, atol=0)


def test_without_dimensions_it_is_the_plain_search() -> None:
    tables, vectors = torch.randn(2, 16, 8), torch.randn(5, 2, 8)
    assert torch.equal(Search(tables)(vectors), ak.encode(vectors, tables))


def test_principal_axes_keep_the_most() -> None:
    """Points that lie in a subspace come back; of others, the largest axes are kept."""
    inside = flat_tables(2, 200, 12, 3).transpose(0, 1)
    space = Subspace.principal(inside, 3)
    back = space.points(space.coordinates(inside).transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(back, inside, rtol=1e-4, atol=1e-4)
    long = torch.randn(500, 1, 4) * torch.tensor([5.0, 0.1, 0.1, 0.1])
    assert Subspace.principal(long, 1).axes[0, 0].abs() > 0.99


def test_default_dimensions_have_to_save_something() -> None:
    assert default_dimensions(1024, 768) == 64
    assert default_dimensions(1024, 128) == 64
    assert default_dimensions(1024, 64) == default_dimensions(64, 128) == 0
    assert search_macs(1024, 768, 0) == 1024 * 768
    assert search_macs(1024, 768, 64) == 64 * (1024 + 768)


@pytest.mark.parametrize("space", ["kv", "hidden"])
def test_fitted_codewords_lie_where_they_are_sought(space: str, tmp_path: Path) -> None:
    model = tiny("gpt2")
    windows = windows_for("gpt2", 4)
    book = Codebook.fit(
        model, windows, space=space, codewords=32, dimensions=5, held_back=0, seed=1
    )
    assert book.tables is not None
    assert book.dimensions == 5
    centered = book.tables - book.tables.mean(2, keepdim=True)
    values = torch.linalg.svdvals(centered)  # [blocks, C, ...]
    assert bool((values[..., 5:] < 1e-4 * values[..., :1]).all())
    assert bool((values[..., 4] > 1e-3 * values[..., 0]).all())
    book.save_pretrained(tmp_path)
    assert Codebook.from_pretrained(tmp_path).digest == book.digest
    whole = Codebook.fit(
        model, windows, space=space, codewords=32, dimensions=0, held_back=0, seed=1
    )
    assert costs_of(adapt(model), book).code < costs_of(adapt(model), whole).code


def test_bad_dimensions_are_refused() -> None:
    model, windows = tiny("gpt2"), windows_for("gpt2", 4)
    with pytest.raises(ValueError, match="dimensions: expected 0 to"):
        Codebook.fit(model, windows, space="hidden", codewords=32, dimensions=10_000)
    with pytest.raises(ValueError, match="dimensions: expected none in space 'transform'"):
        Codebook.fit(model, windows, space="transform", codewords=32, dimensions=4)
    with pytest.raises(ValueError, match="dimensions: expected 0 in space"):
        Codebook("differential", dimensions=3)
