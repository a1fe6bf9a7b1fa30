"""`astra fit` and `astra eval`: codebooks that are fitted, judged and taken from the cache."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from astra_runtime import Codebook
from astra_runtime.cli.fitting import codebook_at_hand, default_fine_bits, default_name

from ..models import tiny
from .commands import PROMPT, model_options


def test_eval_gives_both_controls(home: Path, here: Callable[..., tuple[str, str]]) -> None:
    out, told = here(
        "eval", *model_options(home), "--text", str(home / "text.txt"), "--tokens", "60",
        "--windows", "3", "--world-size", "3", "--json",
    )  # fmt: skip
    assert "windows of" not in told
    found = json.loads(out)
    assert set(found["perplexity"]) == {"exact", "astra", "local_only", "local_overlap"}
    assert found["windows"] == 3
    assert 15 <= found["bits_per_token_block"] < 16
    assert found["compression"] == pytest.approx(2 * 48 * 32 / found["bits_per_token_block"])
    assert math.isfinite(found["gap_recovered"])


def test_eval_says_how_many_windows_a_text_has(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    asked = ["--text", str(home / "text.txt"), "--tokens", "250", "--windows", "9" * 20, "--json"]
    out, told = here("eval", *model_options(home), *asked)
    assert json.loads(out)["windows"] == 2
    assert "the text has 2 windows of 250 tokens" in told


def test_fit_writes_a_codebook_and_tells_its_worth(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    out, _ = here(
        "fit", "--model", str(home / "model"), "--text", str(home / "text.txt"), "--space", "kv",
        "--bits", "40", "--codewords", "16", "--tokens", "50", "--windows", "8",
        "--world-size", "2", "--output", str(home / "new"), "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert found["groups"] == 8  # one set of 4-bit codes for all heads, within 40 bits
    assert found["bits_per_token_block"] == 32
    assert found["verdict"]
    assert Codebook.from_pretrained(home / "new").digest == found["digest"]


def test_bits_alone_make_transform_codes_that_run(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    model, text = ["--model", str(home / "model")], ["--text", str(home / "text.txt")]
    book = str(home / "transform")
    out, told = here(
        "fit", *model, *text, "--bits", "20", "--codewords", "16", "--tokens", "50", "--windows",
        "8", "--sampled", "2", "--world-size", "2", "--output", book, "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert found["space"] == "transform"
    assert 10 < found["bits_per_token_block"] <= 20
    assert "sampling" in told
    assert Codebook.from_pretrained(book).notes["calibration_vectors"] == 6 * 50 + 2 * 50
    out, _ = here(
        "eval", *model, *text, "--codebook", book, "--tokens", "60", "--windows", "2",
        "--world-size", "2", "--json",
    )  # fmt: skip
    # of 29 and 30 tokens a rank, whole bytes
    assert "local_overlap" in json.loads(out)["perplexity"]
    found_bits = json.loads(out)["bits_per_token_block"]
    assert 60 < found["fine_bits"] <= 80  # of all 29: fewer than those that would have fine codes
    # and a quarter of them have fine codes, 8 of 30
    both = found["bits_per_token_block"] + 8 / 30 * found["fine_bits"]
    assert found_bits == pytest.approx(both, rel=0.02)
    out, _ = here(
        "run", *model, "--codebook", book, "--prompt", PROMPT, "--world-size", "2",
        "--max-new-tokens", "3", "--json",
    )  # fmt: skip
    assert len(json.loads(out)["text"].split()) == 3
    out, _ = here(
        "demo", *model, *text, "--codebook", book, "--tokens", "60", "--world-size", "2",
        "--mbit", "100", "--repeats", "1", "--json",
    )  # fmt: skip
    demo = json.loads(out)
    single, dense, coded = (run["perplexity"] for run in demo["runs"])
    assert dense == pytest.approx(single, rel=1e-4)  # of the same tokens
    assert coded == pytest.approx(single, rel=0.5)


FOUND = {"windows": 2, "world_size": 2, "metric": "perplexity", "exact": 1.0, "astra": 1.5}
FOUND |= {"local_only": 2.0}


def test_a_target_is_met_by_the_fewest_bits_tried(
    home: Path, here: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from astra_runtime.train import fit

    monkeypatch.setattr(
        fit, "_evaluate", lambda model, book, *rest: FOUND | {"gap_recovered": book.bits / 50}
    )
    for target, wanted, tried in ((0.3, 20, 3), (0.75, 40, 2), (0.9, 80, 2)):
        out, _ = here(
            "fit", "--model", str(home / "model"), "--text", str(home / "text.txt"),
            "--target-gap", str(target), "--codewords", "16", "--tokens", "50", "--windows", "8",
            "--sampled", "0", "--output", str(home / "target"), "--json",
        )  # fmt: skip
        found = json.loads(out)
        assert found["bits_per_token_block"] <= wanted
        assert found["held_back"]["gap_recovered"] >= target
        assert len(found["tried"]) == tried


@pytest.mark.parametrize(
    ("kind", "space", "bits", "wanted"),
    [
        ("llama", "transform", None, 400),
        ("llama", "transform", 10, 40),
        ("llama", "transform", 3000, 64 * 3 * 16),  # no more than dense fp32
        ("llama", "kv", None, 0),
        ("bert", "transform", None, 0),  # an encoder's tokens look both ways
    ],
)
def test_fine_codes_of_a_decoder_by_default(
    kind: str, space: str, bits: float | None, wanted: float
) -> None:
    assert default_fine_bits(tiny(kind), space, bits) == wanted


def test_differential_codes_are_fitted_evaluated_and_run(
    home: Path, here: Callable[..., tuple[str, str]]
) -> None:
    model, text = ["--model", str(home / "model")], ["--text", str(home / "text.txt")]
    book = str(home / "differential")
    out, told = here(
        "fit", *model, *text, "--space", "differential", "--groups", "4", "--codewords", "16",
        "--tokens", "50", "--windows", "8", "--world-size", "2", "--output", book, "--json",
    )  # fmt: skip
    bits = 4 * 4 * 2 / 3  # the first of three blocks sends nothing
    assert json.loads(out)["bits_per_token_block"] == pytest.approx(bits)
    assert "10.667 bits a token and block" in told
    out, _ = here(
        "eval", *model, *text, "--codebook", book, "--tokens", "60", "--windows", "2",
        "--world-size", "2", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert found["bits_per_token_block"] == pytest.approx(bits)
    assert found["compression"] == pytest.approx(48 * 32 / bits)
    out, _ = here(
        "run", *model, "--codebook", book, "--prompt", PROMPT, "--world-size", "2",
        "--max-new-tokens", "3", "--halo", "0", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert len(found["text"].split()) == 3
    assert found["bits_per_token_block"] == pytest.approx(bits)


def test_a_default_codebook_of_another_default_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path))
    options = argparse.Namespace(model="some/model", codebook=None)
    for name, taken in (("model-0-transform", False), (default_name("some/model", "0"), True)):
        (tmp_path / "codebooks" / name).mkdir(parents=True)
        (tmp_path / "codebooks" / name / "astra_config.json").touch()
        assert codebook_at_hand(options) is taken
