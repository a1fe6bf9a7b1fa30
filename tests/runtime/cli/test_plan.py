"""`astra plan`: what it asks, measures, recommends and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from astra_runtime import Codebook
from astra_runtime.call import Sizes
from astra_runtime.cli import main
from astra_runtime.costs import engine_plan
from astra_runtime.models import adapt

from ..models import book_of, fitted, tiny


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_shape_is_planned_from_flops(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "vit-base", "--flops", "50e9", "--tokens", "196"]
    found = planned(capsys, *asked, "--world-size", "2", "4", "--mbit", "10")
    assert found["recommended"]["world_size"] == 4
    assert 2.5 < found["recommended"]["speedup"] < 3.7
    assert {row["codes"] for row in found["rows"]} >= {"kv, one code", "dense int8"}
    assert [row["seconds"] for row in found["rows"]] == sorted(r["seconds"] for r in found["rows"])
    far = planned(capsys, *asked, "--world-size", "2", "--mbit", "0.01", "--rtt-ms", "2000")
    assert far["recommended"] is None  # stay on one device


def test_a_recommendation_says_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", "vit-base", "--flops", "50e9", "--tokens", "196"]
    for mbit, codes in (("10", "hidden, one code"), ("0", "dense float32")):
        assert main([*asked, "--world-size", "4", "--mbit", mbit, "--rtt-ms", "0"]) == 0
        told = capsys.readouterr().out
        assert f"recommended: {codes} on" in told
        assert ("is known after a fit" in told) is not codes.startswith("dense")


def test_uneven_devices_get_uneven_shards(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "gpt2", "--flops", "1e11", "--world-size", "2", "--speeds", "1,0.5"]
    first, second = planned(capsys, *asked)["recommended"]["shards"]
    assert first > 1.7 * second


def test_this_machine_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    fitted("llama", model, space="kv", groups=3).save_pretrained(tmp_path / "codes")
    word_tokenizer().save_pretrained(tmp_path / "model")
    found = planned(
        capsys,
        *("--model", str(tmp_path / "model"), "--codebook", str(tmp_path / "codes")),
        *("--tokens", "40", "--world-size", "2"),
    )
    assert found["single_seconds"] > 0
    assert {row["codes"] for row in found["rows"]} == {
        "codes",
        *(f"dense {dtype}" for dtype in ("float32", "float16", "int8")),
    }


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit-base"], "--flops: expected with the shape vit-base"),
        (["--model", "gpt2", "--flops", "1e9", "--speeds", "1,x"], "--speeds: expected positive"),
        (["--model", "gpt2", "--flops", "1e9", "--speeds", "1,1"], "--world-size 2, got 2 3 4 8"),
    ],
)
def test_bad_questions_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and codebooks for it of one name and of another."""
    folder = tmp_path_factory.mktemp("own")
    model = tiny("llama")
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    for at, groups in (("a/codes", 3), ("b/codes", 6), ("other", 3)):
        fitted("llama", model, space="kv", groups=groups).save_pretrained(folder / at)
    return folder


def test_codebooks_of_one_name_are_told_apart(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books = [str(own / at) for at in ("a/codes", "b/codes", "other", "other")]
    asked = ["--model", str(own / "model"), "--flops", "1e9", "--tokens", "100"]
    found = planned(capsys, *asked, "--world-size", "2", "--codebook", *books)
    bits = {row["codes"]: row["bits_per_token_block"] for row in found["rows"]}
    named = {name: value for name, value in bits.items() if not name.startswith("dense")}
    assert set(named) == {*books[:2], "other"}
    assert named[books[1]] == 2 * named[books[0]]


def test_bits_are_those_that_the_engine_counts(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    options = {"bits": 40, "codewords": 16, "rank": 8, "iterations": 3, "held_back": 0}
    book = book_of(model, "llama", space="transform", fine_bits=60, fine_tokens=8, **options)
    book.save_pretrained(own / "fine")
    asked = ["--model", str(own / "model"), "--flops", "1e9", "--codebook", str(own / "fine")]
    rows = planned(capsys, *asked, "--tokens", "101", "--world-size", "3")["rows"]
    (row,) = [row for row in rows if not row["codes"].startswith("dense")]
    adapter = adapt(model)
    plan = engine_plan(adapter, book, 101, 3, shard_weights=row["shards"])
    sizes = Sizes.of(book.make_codec(adapter), len(adapter.blocks), 0, plan, 1)
    assert book.fine[1].codes
    assert row["bits_per_token_block"] == pytest.approx(sizes.bits_per_token_block(1), abs=0.5)
    assert row["bits_per_token_block"] > book.bits + 1


def test_codes_are_looked_at_or_the_plan_says_that_they_were_not(
    own: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from astra_runtime.cli.fitting import default_name

    monkeypatch.setenv("ASTRA_CACHE", str(tmp_path))
    asked = ["plan", "--json", "--model", str(own / "model"), "--world-size", "2"]
    assert main([*asked, "--tokens", "30"]) == 0
    said = capsys.readouterr()
    assert "codes were not looked at" in said.err
    assert all(row["codes"].startswith("dense") for row in json.loads(said.out)["rows"])
    assert main([*asked, "--tokens", "30", "--codebook", "none"]) == 0
    assert "codes were not looked at" not in capsys.readouterr().err
    book = Codebook.from_pretrained(own / "other")
    name = default_name("model", str(book.model))
    book.save_pretrained(tmp_path / "codebooks" / name)
    assert main([*asked, "--flops", "1e9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert name in {row["codes"] for row in found["rows"]}
    assert found["tokens"] == 256  # what the model reads


@pytest.mark.parametrize("more", [[], ["--peers", "127.0.0.1:1,127.0.0.1:2"]])
def test_more_tokens_than_the_model_reads_are_refused(
    own: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", "--model", str(own / "model"), "--codebook", str(own / "other")]
    assert main([*asked, "--tokens", "257", *more]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "astra: error: --tokens: expected at most 256, the model's limit, got 257"


def test_an_encoders_tokens_count_its_class_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("bert").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    found = planned(capsys, "--model", str(tmp_path), "--world-size", "2", "--codebook", "none")
    assert found["tokens"] == 128
    assert sum(found["rows"][0]["shards"]) == 127


@pytest.mark.parametrize(("changes", "patches"), [({}, 25), ({"image_size": [20, 16]}, 20)])
def test_images_have_the_patches_of_their_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, patches: int
) -> None:
    """Such a model has no tokenizer; more devices than tokens are left out."""
    tiny("vit", **changes).save_pretrained(tmp_path)
    asked = ["--model", str(tmp_path), "--codebook", "none", "--world-size", "2", "1000000000"]
    found = planned(capsys, *asked)
    assert found["tokens"] == patches
    assert {row["world_size"] for row in found["rows"]} == {2}
