"""The accuracy benchmarks with a tiny model: what is simulated, and rows that are resumed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from astra_runtime import Codebook
from astra_runtime.models import adapt
from bench import codebooks
from bench.accuracy import calibrate, corpora, encoder, fitting, lm, ranks, simulated, tables
from bench.lossy import degraded, perplexity
from bench.report import Rows, sources
from tests.runtime.models import inputs_for, tiny, windows_for

TOKENS = 32


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in ("results", "markdown"):
        monkeypatch.setattr(f"bench.report.{module}.RESULTS", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture
def windows(monkeypatch):
    """Three windows of 32 tokens, in place of 1,024."""
    for module in (simulated, lm, ranks, degraded, perplexity):
        monkeypatch.setattr(module, "TOKENS", TOKENS)
    return [inputs_for("llama", TOKENS, seed=seed)["input_ids"][0] for seed in range(3)]


@pytest.fixture
def books(model):
    fitted = Codebook.fit(
        model, windows_for("llama"), space="kv", groups=3, codewords=16, iterations=2, prefix=0
    )
    return {"kv:3": fitted, "none:int8": Codebook.none("int8")}


def in_place_of_smollm2(monkeypatch, module, model, windows, books):
    """Model, texts and codebooks of a benchmark; windows of a text are those of the test."""
    monkeypatch.setattr(module, "load_model", lambda name: model)
    monkeypatch.setattr(module, "load_tokenizer", lambda name: None)
    for place in (module, corpora):
        if hasattr(place, "token_windows"):
            monkeypatch.setattr(place, "corpus", lambda domain: ("", ""))
            monkeypatch.setattr(place, "token_windows", lambda *_: windows)
    if hasattr(module, "codebook_of"):
        monkeypatch.setattr(module, "codebook_of", lambda name, *_: books[name])


def rows_of(results, name):
    (path,) = results.glob(f"*/{name}.json")
    return json.loads(path.read_text())["rows"]


def test_rows_are_measured_once_and_kept_by_the_next_run(results):
    lines: list[str] = []
    rows = Rows("some", command="python -m bench.some", packages=(), say=lines.append)
    first = rows.measured({"codes": "a"}, lambda: {"losses": [1, 2], "mean": 1.5})
    assert first == {"codes": "a", "losses": [1, 2], "mean": 1.5, "run": rows.run}
    assert rows.run["command"] == "python -m bench.some"
    assert rows.run["commit"]
    assert rows_of(results, "some") == [first]
    assert json.loads(lines[0]) == {"codes": "a", "mean": 1.5}
    again = Rows("some", command="python -m bench.some again", packages=(), say=lines.append)

    def never():
        raise AssertionError("measured twice")

    assert again.measured({"codes": "a"}, never) == first
    second = again.measured({"codes": "b"}, lambda: {"mean": 2})
    assert second["run"]["command"] == "python -m bench.some again"
    again.change(again.rows[0], {"mean": 3})
    first = first | {"mean": 3, "computed": again.run}
    assert rows_of(results, "some") == [first, second]
    assert len(lines) == 2


def test_a_table_names_the_runs_of_its_rows():
    runs = [{"command": f"python -m bench.some {n}", "commit": str(n) * 9} for n in range(4)]
    report = {**runs[0], "device": "a device", "versions": {}}
    rows = [{"run": runs[1]}, {"run": runs[1], "computed": runs[2]}, {"run": runs[3]}, {}]
    assert sources(report, rows).splitlines() == [
        "",
        "",
        "On a device:",
        "",
        "- `python -m bench.some 1`, commit 1111111",
        "- `python -m bench.some 3`, commit 3333333",
        "- some rows, measured before: command and commit were not kept",
        "- `python -m bench.some 2`, commit 2222222: bits and FLOPs",
    ]
    assert sources(report, [{}, {}]).splitlines()[4:] == [
        "- `python -m bench.some 0`, commit 0000000"
    ]


def test_an_interrupted_run_keeps_what_it_has(results):
    rows = Rows("some", command="", packages=(), say=lambda line: None)

    def interrupted():
        raise KeyboardInterrupt

    rows.measured({"codes": "a"}, lambda: {"mean": 1})
    with pytest.raises(KeyboardInterrupt):
        rows.measured({"codes": "b"}, interrupted)
    assert rows_of(results, "some") == [{"codes": "a", "mean": 1, "run": rows.run}]


def test_names_of_codebooks():
    assert codebooks.control("none:int8").dtype == "int8"
    assert codebooks.control("none").dtype == "float32"
    assert codebooks.control("drop").space == "drop"
    assert codebooks.control("kv:3") is None
    assert codebooks.size_of("kv:3") == {"space": "kv", "groups": 3}
    assert codebooks.size_of("transform:1.25") == {"space": "transform", "bits": 1.25}
    fine = {"space": "transform", "bits": 10.0, "fine_bits": 40.0, "fine_tokens": 64}
    assert codebooks.size_of("transform:10+40") == fine
    assert codebooks.size_of("transform:10+40x8") == fine | {"fine_tokens": 8}
    assert codebooks.folder(10, 1) != codebooks.folder(10, 1, 40)


def test_bits_are_those_of_the_payload(model, books):
    adapter = adapt(model)  # 3 KV heads of 16 channels
    bits = {name: codebooks.bits_per_token_block(book, adapter) for name, book in books.items()}
    assert bits == {"kv:3": 3 * 4, "none:int8": 2 * 3 * (16 * 8 + 16)}
    exact, local_only = (
        codebooks.bits_per_token_block(book, adapter) for book in codebooks.CONTROLS.values()
    )
    assert (exact, local_only) == (2 * 3 * 16 * 32, 0)


def test_controls_are_the_model_and_its_shards(model, windows):
    """Exact is the model's own loss after the first shard; local-only that of each shard alone."""
    controls = simulated.control_losses(model, windows, 2)
    with torch.inference_mode():
        for number, ids in enumerate(windows):
            logits = model(ids[None]).logits[0]
            whole = F.cross_entropy(logits[16:-1], ids[17:])
            assert controls["exact"][number] == pytest.approx(float(whole), abs=1e-4)
            alone = model(ids[None, 16:], position_ids=torch.arange(16, 32)[None]).logits[0]
            shard = F.cross_entropy(alone[:-1], ids[17:])
            assert controls["local_only"][number] == pytest.approx(float(shard), abs=1e-4)


def test_the_gap_recovered_lies_between_the_controls(model, books):
    controls = {"exact": [1.0, 2.0], "local_only": [2.0, 4.0]}
    found = simulated.figures(model, books["kv:3"], [1.5, 2.5], controls)
    assert found["gap_recovered"] == pytest.approx((3 - 2) / (3 - 1.5))
    assert found["gap_spread"] == pytest.approx(0.25 / 2**0.5)  # .5 and .75
    assert simulated.figures(model, books["kv:3"], controls["exact"], controls)[
        "gap_recovered"
    ] == pytest.approx(1)


def test_perplexity_by_text_and_ranks(results, monkeypatch, model, windows, books):
    in_place_of_smollm2(monkeypatch, lm, model, windows, books)
    arguments = ["--codes", "none:int8", "kv:3", "--ranks", "2", "--domains", "novels"]
    lm.main([*arguments, "--halos", "0", "2"])
    rows = rows_of(results, "accuracy_lm")
    places = [(row["codes"], row["halo"]) for row in rows]
    assert sorted(places) == sorted(
        [("exact", 0), ("local_only", 0), ("local_prefix_0", 2)]
        + [(name, halo) for name in ("none:int8", "kv:3") for halo in (0, 2)]
    )
    by_place = dict(zip(places, rows, strict=True))
    assert by_place["none:int8", 0]["gap_recovered"] == pytest.approx(1, abs=0.02)
    assert by_place["kv:3", 0]["bits_per_token_block"] == 12
    assert len(by_place["kv:3", 2]["losses"]) == len(windows)

    def never(*_, **__):
        raise AssertionError("measured twice")

    monkeypatch.setattr(lm, "losses", never)
    lm.main([*arguments, "--halos", "0", "2"])
    assert rows_of(results, "accuracy_lm") == rows


def test_bits_work_and_accuracy_by_ranks(results, monkeypatch, model, windows, books):
    fine = Codebook.fit(
        model,
        windows_for("llama"),
        **codebooks.size_of("transform:12+40x4"),
        codewords=16,
        iterations=2,
        held_back=0,
    )
    books["transform:12+40x4"] = fine
    books["transform:12"] = codebooks.without_fine(fine)
    in_place_of_smollm2(monkeypatch, ranks, model, windows, books)
    names = ["transform:12", "transform:12+40x4"]
    ranks.main(["--codes", *names, "--ranks", "2", "--domains", "handbook", "--halo", "0"])
    rows = {row["codes"]: row for row in rows_of(results, "accuracy_ranks")}
    assert set(rows) == {"exact", "local_only", *names}
    exact = simulated.control_losses(model, windows, 2)["exact"]
    assert rows["exact"]["losses"] == pytest.approx(exact, abs=1e-4)
    coarse, both = (rows[name] for name in names)
    # of the 15 or 16 tokens that rank 0 sends
    more = sum(part.codes for part in fine.fine) * 6 / len(fine.fine)
    assert both["bits_per_receiver"] - coarse["bits_per_receiver"] == pytest.approx(
        more * 4 / 15, rel=0.15
    )
    # counted, on ranks that share the tokens out otherwise for it
    assert both["flops_over_ideal"] != coarse["flops_over_ideal"]
    assert both["perplexity"] != coarse["perplexity"]
    table = tables.accuracy_ranks(
        json.loads(next(results.glob("*/accuracy_ranks.json")).read_text())
    )
    assert "handbook, unseen" in table
    assert len([line for line in table.splitlines() if "| transform:12" in line]) == 2


def test_bits_and_flops_of_rows_follow_the_plans(results, monkeypatch, model, windows, books):
    in_place_of_smollm2(monkeypatch, ranks, model, windows, books)
    asked = ["--codes", "kv:3", "--ranks", "2", "--domains", "handbook", "--halo", "0"]
    ranks.main(asked)
    before = rows_of(results, "accuracy_ranks")

    def never(*_, **__):
        raise AssertionError("measured again")

    for name in ("losses", "exact_losses"):
        monkeypatch.setattr(ranks, name, never)
    monkeypatch.setattr(ranks, "flops_over_ideal", lambda *_: 1.25)
    ranks.main(asked)
    assert rows_of(results, "accuracy_ranks") == before
    ranks.main([*asked, "--plans", "--ranks", "2", "4"])  # of four ranks there is no row
    after = rows_of(results, "accuracy_ranks")
    computed = {"flops_over_ideal": 1.25, "computed": after[-1].get("computed")}
    assert computed["computed"]["command"].endswith("--plans --ranks 2 4")
    assert after == [row | computed if row["codes"] == "kv:3" else row for row in before]


def test_losses_that_were_measured_before_are_taken(results, monkeypatch, model, windows, books):
    in_place_of_smollm2(monkeypatch, lm, model, windows, books)
    in_place_of_smollm2(monkeypatch, ranks, model, windows, books)
    lm.main(["--codes", "kv:3", "--ranks", "2", "--domains", "handbook", "--halos", "0"])

    def never(*_, **__):
        raise AssertionError("measured twice")

    for name in ("losses", "exact_losses"):
        monkeypatch.setattr(ranks, name, never)
    ranks.main(["--codes", "kv:3", "--ranks", "2", "--domains", "handbook", "--halo", "0"])
    before = {row["codes"]: row["losses"] for row in rows_of(results, "accuracy_lm")}
    after = {row["codes"]: row["losses"] for row in rows_of(results, "accuracy_ranks")}
    assert after == {name: before[name] for name in after}
    assert set(after) == {"exact", "local_only", "kv:3"}
    asked = ["--codes", "kv:3", "--ranks", "2", "--domains", "handbook", "--halo", "0"]
    ranks.main([*asked, "--every", "2"])
    row = next(
        r for r in rows_of(results, "accuracy_ranks") if (r["codes"], r["windows"]) == ("kv:3", 2)
    )
    assert row["losses"] == before["kv:3"][::2]


def test_missing_frames(results, monkeypatch, model, windows, books):
    in_place_of_smollm2(monkeypatch, degraded, model, windows, books)
    asked = ["--codes", "kv:3", "--shares", "0", "0.5", "1", "--ranks", "2", "--halo", "0"]
    threads = torch.get_num_threads()
    degraded.main([*asked, "--windows", "3"])
    torch.set_num_threads(threads)
    rows = {(row["codes"], row["missing"]): row for row in rows_of(results, "degraded")}
    assert set(rows) == {("exact", 0), ("local_only", 0)} | {("kv:3", n) for n in (0, 0.5, 1)}
    everything = rows["kv:3", 1]
    assert everything["gap_recovered"] == pytest.approx(0, abs=1e-3)
    assert everything["losses"] == pytest.approx(rows["local_only", 0]["losses"], abs=1e-4)


def test_lost_datagrams(results, monkeypatch, model, windows, books):
    in_place_of_smollm2(monkeypatch, perplexity, model, windows, books)
    fitted = Codebook.fit(
        model, windows_for("llama"), space="transform", bits=20, codewords=16, held_back=0
    )
    books = books | {"transform:20": fitted}
    monkeypatch.setattr(perplexity, "kept_codebook_of", lambda name, *_: books[name])
    options = argparse.Namespace(domain="", windows=3, halo=[0], losses=[0.0, 1.0], after_loss=None)
    for codes, after_loss in ((["kv:3", "transform:20"], None), (["transform:20"], "stale")):
        options.codes, options.after_loss = codes, after_loss
        perplexity.perplexity(options, "python -m bench.lossy perplexity")
    rows = rows_of(results, "lossy_perplexity")
    assert [(row["datagrams_lost"], row["parity"] > 0, row["afterwards"]) for row in rows] == [
        (0, False, None),
        (1, False, "stale"),
        (1, True, "stale"),
        (0, False, None),
        (1, False, "predicted"),
        (1, True, "predicted"),
        (1, False, "stale"),
        (1, True, "stale"),
    ]
    assert rows[1]["gap_recovered"] == pytest.approx(0, abs=1e-3)
    assert rows[0]["perplexity"] != pytest.approx(rows[1]["perplexity"])
    assert rows[4]["perplexity"] != pytest.approx(rows[6]["perplexity"])


def test_embeddings_of_an_encoder(results, monkeypatch):
    texts = [inputs_for("bert", TOKENS, seed=seed)["input_ids"][0] for seed in range(12)]
    monkeypatch.setattr(encoder, "TOKENS", TOKENS)
    in_place_of_smollm2(monkeypatch, encoder, tiny("bert"), texts, {})
    monkeypatch.setattr(encoder, "codebook_of", lambda name, *_: codebooks.control(name))
    encoder.main(["--codes", "none:int8", "drop", "--domains", "novels"])
    rows = {row["codes"]: row for row in rows_of(results, "accuracy_encoder")}
    assert rows["none:int8"]["cosine"] == pytest.approx(1, abs=1e-3)
    assert rows["drop"]["cosine"] < rows["none:int8"]["cosine"]
    assert rows["drop"]["bits_per_token_block"] == 0


def test_calibration_text_is_never_that_of_the_evaluation():
    with pytest.raises(ValueError, match="expected no domain that is to be unseen, got handbook"):
        calibrate.windows(None, ["handbook:2"], 0)


def test_budgets_have_fine_codes_of_their_own(monkeypatch, model, tmp_path):
    windows = [inputs_for("llama", 120, seed=seed)["input_ids"][0] for seed in range(8)]
    in_place_of_smollm2(monkeypatch, calibrate, model, windows, {})
    monkeypatch.setattr(codebooks, "FOLDER", tmp_path)
    asked = ["--bits", "16", "32", "--text", "novels:8", "--fine-bits"]
    calibrate.main([*asked, "24", "48"])
    small, large = (
        codebooks.calibrated(name, 0) for name in ("transform:16+24", "transform:32+48")
    )
    assert 8 < small.bits <= 16 < large.bits <= 32
    assert 12 < small.fine_bits <= 24 < large.fine_bits <= 48
    assert not codebooks.calibrated("transform:16", 0).fine
    with pytest.raises(SystemExit):
        calibrate.main([*asked, "24", "48", "96"])


def test_a_fit_is_measured_and_what_its_codes_keep(results, monkeypatch, model, windows, tmp_path):
    book = Codebook.fit(
        model, windows_for("llama"), space="transform", bits=20, codewords=16, held_back=0
    )
    in_place_of_smollm2(monkeypatch, fitting, model, windows, {})
    other = tmp_path / "other"
    book.save_pretrained(other)

    def saves(name, folder):
        book.save_pretrained(folder)
        return [sys.executable, "-c", "x = bytearray(1 << 26)"]

    monkeypatch.setattr(fitting, "command_of", saves)
    fitting.main(["--domains", "novels", "--beside", str(other)])
    (row,) = rows_of(results, "fitting")
    assert row["model_bytes"] == sum(4 * weight.numel() for weight in model.parameters())
    assert row["peak_bytes"] > 1 << 26
    assert row["seconds"] > 0
    assert row["processor_seconds"] > 0
    kept = row["kept"]["novels"]
    assert kept["other"]["gap_recovered"] == kept["gap_recovered"]
    assert kept["other"]["ours_more"] == kept["other"]["standard_error"] == 0


def test_a_fit_that_fails_is_not_measured():
    with pytest.raises(subprocess.CalledProcessError):
        fitting.usage([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_shape_is_fitted_as_by_default(monkeypatch):
    monkeypatch.setattr(fitting, "TOKENS", 60)
    monkeypatch.setattr(fitting, "BITS", 16)
    said = []
    monkeypatch.setattr(fitting, "say", said.append)
    fitting.main(["--fit", "llama-tiny"])
    assert said[0].startswith("16.0 bits")
