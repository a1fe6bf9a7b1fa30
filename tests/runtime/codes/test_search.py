"""Searching in few dimensions: less work, nearly the same codewords."""

from __future__ import annotations

import pytest
import torch

import astra_kernels as ak
from astra_runtime.codes.search import DIMENSIONS, Search, search_dimensions, search_macs
from astra_runtime.costs import costs_of
from astra_runtime.models import adapt
from astra_runtime.train.simulate import frozen

from ..models import fitted, inputs_for, tiny


@pytest.mark.parametrize(("groups", "codewords", "width", "r"), [(1, 300, 96, 8), (3, 64, 40, 16)])
def test_codewords_of_a_subspace_are_found_exactly(
    groups: int, codewords: int, width: int, r: int
) -> None:
    """What lies outside of the axes is equally far from all of them."""
    axes = torch.randn(groups, r, width)
    tables = torch.randn(groups, codewords, r) @ axes + torch.randn(groups, 1, width)
    vectors = 3 * torch.randn(2, 50, groups, width)
    codes = Search(tables, r)(vectors)
    assert codes.shape == (2, 50, groups)
    assert codes.dtype == torch.int32
    of_groups = vectors.double().flatten(0, 1).transpose(0, 1)[:, :, None]
    distance = (of_groups - tables.double()[:, None]).norm(dim=-1)  # [C, n, K]
    found = distance.gather(-1, codes.flatten(0, 1).T[..., None].long())[..., 0]
    torch.testing.assert_close(found, distance.amin(-1), rtol=1e-5, atol=0)


def test_of_other_codewords_a_near_one_is_found() -> None:
    """Codewords with a long tail of small axes, as fitted ones have."""
    scale = 0.95 ** torch.arange(256)
    tables, vectors = torch.randn(1, 1024, 256) * scale, torch.randn(400, 1, 256) * scale
    exact = ak.decode(ak.encode(vectors, tables), tables)
    near = ak.decode(Search(tables, 64)(vectors), tables)
    far = ak.decode(Search(tables, 4)(vectors), tables)
    errors = [float((vectors - found).square().sum()) for found in (exact, near, far)]
    assert errors[0] <= errors[1] < 1.01 * errors[0] < 1.1 * errors[0] < errors[2]


def test_narrow_groups_are_searched_whole() -> None:
    tables, vectors = torch.randn(2, 16, 8), torch.randn(5, 2, 8)
    assert torch.equal(Search(tables)(vectors), ak.encode(vectors, tables))


def test_few_dimensions_have_to_halve_the_search() -> None:
    assert search_dimensions(1024, 768) == search_dimensions(1024, 384) == DIMENSIONS
    assert search_dimensions(1024, 128) == search_dimensions(1024, 64) == 0
    assert search_dimensions(64, 768) == 0
    assert search_macs(1024, 768) == 64 * (1024 + 768)
    assert search_macs(1024, 128) == 1024 * 128


def test_engine_simulation_and_costs_search_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astra_runtime.codes.search.DIMENSIONS", 6)
    model = tiny("gpt2")
    book = fitted("gpt2", model, space="hidden", groups=1)
    assert search_dimensions(book.codewords, 48) == 6
    adapter = adapt(model)
    space, quantizer = book.make_codec(adapter), frozen(book, "cpu")[1]
    hidden = model.transformer.wte(inputs_for("gpt2")["input_ids"])[..., None, :].detach()
    codes = quantizer(hidden).codes
    assert torch.equal(space.searches[1](hidden), codes)  # type: ignore[attr-defined]
    assert not torch.equal(codes, ak.encode(hidden, book.tables[1]))  # type: ignore[index]
    assert costs_of(adapter, book).code == 2 * 6 * (book.codewords + 48)


@pytest.mark.parametrize("dimensions", [0, 16])
def test_16_bit_searches_find_codewords_as_near(dimensions: int) -> None:
    tables, vectors = torch.randn(2, 300, 64), torch.randn(400, 2, 64)
    exact = Search(tables, dimensions)(vectors)
    codes = Search(tables, dimensions, torch.float16)(vectors)
    assert (codes != exact).double().mean() < 0.02
    errors = [(ak.decode(c, tables) - vectors).square().sum() for c in (codes, exact)]
    assert errors[0] <= errors[1] * (1 + 1e-3)
