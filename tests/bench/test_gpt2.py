"""The accuracy benchmark in a few seconds, its text, its trainer, and the tables of its result."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from astra_runtime.errors import AstraError
from bench import gpt2
from bench.accuracy import corpora
from bench.gpt2 import __main__ as program
from bench.gpt2.measure import summary
from bench.gpt2.model import Muon, Shape, new_model, orthogonal, revised
from bench.gpt2.tables import gpt2_bits, gpt2_ranks, gpt2_settings


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def beginnings(domain: str) -> tuple[str, ...]:
        """To make tokens of a whole corpus takes seconds."""
        return tuple(text[:40_000] for text in corpora.corpus(domain))

    folder = tmp_path_factory.mktemp("gpt2")
    few = {"noise": (0.1,), "commitment": (1e-4,), "codewords": (16,), "seeds": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASTRA_CACHE", str(folder))
        patch.setattr("bench.gpt2.model.corpus", beginnings)
        patch.setattr(program, "QUICK", replace(program.QUICK, **few))
        program.main(["--quick", "--results", str(folder), "--output", "quick"])
    (file,) = folder.glob("*/quick.json")
    return json.loads(file.read_text())


def test_every_row_has_what_it_is_read_by(report: dict[str, Any]) -> None:
    groups = {row["group"] for row in report["rows"]}
    assert groups == {
        "control",
        "bits",
        "lost",
        "ranks",
        "noise",
        "commitment",
        "codewords",
    }
    for row in report["rows"]:
        assert row["domain"] in ("documentation", "source")
        assert row["seeds"] >= 1
        assert row["windows"] == 2
        assert row["world_size"] in (2, 4)
        assert row["perplexity"] > 1
        assert row["perplexity_std"] >= 0
        assert row["flops_over_ideal"] > (0.5 if row["space"] == "drop" else 1)
        assert (row["compression"] is None) is (row["bits_per_token_block"] == 0)


def test_controls_are_what_they_are_called(report: dict[str, Any]) -> None:
    """Exact over exact is 1 or worse, dropped over exact is what the other rows say of it."""
    controls = [row for row in report["rows"] if row["group"] == "control"]
    for row in controls:
        if row["space"] == "none":
            assert row["ratio_to_exact"] >= 1
        if row["space"] == "drop" and row["adapted"]:
            assert row["gap_recovered"] in (0, None)
        if row["space"] == "none:int8":
            assert row["ratio_to_exact"] == pytest.approx(1, abs=0.05)
            assert row["compression"] == pytest.approx(32 / 2 / (8 + 16 / 8))


def test_tables_hold_every_row(report: dict[str, Any]) -> None:
    bits, settings, ranks = (make(report) for make in (gpt2_bits, gpt2_settings, gpt2_ranks))
    codes = {
        (row["space"], row.get("groups"), row["adapted"])
        for row in report["rows"]
        if row["group"] in ("control", "bits")
    }
    assert bits.count("\n| ") == len(codes) + 1
    assert "| – |" not in settings
    for text in ("λ = 0.1", "β = 0.0001", "K = 16"):
        assert text in settings
    assert "N = 2" in ranks
    assert "5% lost" in ranks
    half = {**report, "rows": report["rows"][:1]}  # a run that was cut short
    for make in (gpt2_bits, gpt2_settings, gpt2_ranks):
        assert "`python -m bench.gpt2" in make(half)


@pytest.mark.parametrize("period", [512, 2048])
def test_revised_windows_repeat_their_beginning_but_for_some_passages(period: int) -> None:
    row, other = torch.arange(4096), -torch.arange(4096)
    found = revised(row, other, torch.Generator().manual_seed(0), period)
    assert torch.equal(found[:period], row[:period])
    again = row[:period].repeat(4096 // period)
    same = (found == again).view(32, 128)
    assert bool((same.all(1) | ~same[:, 1:].any(1)).all())  # whole passages
    assert 0 < int((~same).any(1).sum()) < 8
    assert torch.equal(found[found != again], other[found != again])


def test_two_heads_start_out_recalling() -> None:
    """The first looks at the token before, the second at what followed the same token earlier."""
    shape = Shape()
    model = new_model(shape)
    model.set_attn_implementation("eager")
    ids = torch.randperm(shape.vocabulary)[:100].repeat(2)[None]
    with torch.no_grad():
        first, second = (a[0, 0] for a in model(ids, output_attentions=True).attentions[:2])
    assert float(first.diagonal(-1).mean()) > 0.8
    assert float(second.diagonal(-99)[1:].mean()) > 0.1  # 0.01 of chance


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_orthogonal_updates_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.4


def test_muon_goes_downhill() -> None:
    torch.manual_seed(0)
    weight, wanted = torch.nn.Parameter(torch.randn(8, 24)), torch.randn(8, 24)
    muon = Muon([weight])
    before = float((weight - wanted).detach().square().mean())
    for _ in range(150):
        (weight - wanted).square().mean().backward()  # type: ignore[no-untyped-call]
        muon.step(0.02)
        weight.grad = None
    assert float((weight - wanted).detach().square().mean()) < 0.5 * before


def test_a_summary_without_meaning_says_none() -> None:
    found = summary([1.0, 1.2], [(1.0, 0.9), (1.0, 2.0)])  # dropping does no harm in one seed
    assert found["gap_recovered"] is None
    assert found["ratio_to_exact"] == pytest.approx((1 + math.exp(0.2)) / 2)
    found = summary([1.0, 1.2], [(1.0, 2.0), (1.0, 2.0)])
    assert found["gap_recovered"] == pytest.approx(0.9)


def test_corpora_split_without_overlap() -> None:
    documents = [f"only in {i}\n\nin all\n\nonly in {i}" for i in range(7)]
    calibration, evaluation = corpora.split(documents)
    assert evaluation == "only in 0\n\nin all\n\nonly in 5"
    assert calibration == "only in 1\n\nonly in 2\n\nonly in 3\n\nonly in 4\n\nonly in 6"


def test_a_missing_corpus_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path))
    assert not corpora.available("handbook")
    with pytest.raises(AstraError, match="debian-handbook is not unpacked.*corpora --fetch"):
        corpora.corpus("handbook")
    with pytest.raises(ValueError, match="domain: expected one of documentation"):
        corpora.corpus("novels")


def test_markup_goes() -> None:
    page = r""".TH x 1
.SH NAME
x \- does \fBthings\fP
.PP
.BR open (2)
and \(aqquotes\(aq
.\" a comment
.IR name " of it"
"""
    assert corpora.plain_roff(page).strip() == (
        "NAME\nx - does things\n\nopen(2)\nand 'quotes'\nname of it"
    )
    html = "<head><title>no</title></head><body><p>A first   paragraph\nthat is long enough to stay"
    html += "</p><a>next</a><pre>  kept   as it is, since it is preformatted text</pre></body>"
    assert corpora.plain_html(html) == (
        "A first paragraph that is long enough to stay\n\n"
        "  kept   as it is, since it is preformatted text"
    )


def test_the_row_that_a_goal_looks_at() -> None:
    def row(compression: float, ratio: float, flops: float) -> dict[str, float]:
        return {"compression": compression, "ratio_to_exact": ratio, "flops_over_ideal": flops}

    near, costly, many_bits = row(102, 1.05, 1.15), row(102, 1.01, 1.3), row(50, 1.0, 1.0)
    far = row(128, 3.0, 1.1)
    assert gpt2.best([costly, many_bits, near, far]) is near
    assert gpt2.best([many_bits, costly, far]) is costly  # and what it misses is said
    assert gpt2.best([many_bits]) is None
