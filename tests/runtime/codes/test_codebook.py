"""Codebooks: layout, fitting, what `fit` says of its own result, files."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import astra_kernels as ak
from astra_runtime import Codebook, Engine
from astra_runtime.cli.fitting import verdict
from astra_runtime.codes.kv import balance
from astra_runtime.codes.layouts import split_groups, split_tables
from astra_runtime.codes.rotary import rotate, unrotate
from astra_runtime.files import CONFIG_FILE, TENSOR_FILE
from astra_runtime.models import adapt
from astra_runtime.train.kmeans import kmeans

from ..models import inputs_for, tiny, windows_for


@pytest.mark.parametrize(("groups", "shared"), [(3, False), (12, False), (1, True), (4, True)])
def test_tables_undo_split_groups(groups: int, shared: bool) -> None:
    """A codebook that holds the vectors themselves gives the keys and values back."""
    key, value = torch.randn(2, 1, 3, 5, 16)
    scales = torch.rand(3, 2) + 0.5
    vectors = split_groups(key, value, scales, groups, shared)
    assert vectors.shape == (1, 5, groups, 2 * 16 * 3 // groups)
    table = vectors[0].transpose(0, 1)  # [C, K=5, w]: token t is codeword t
    keys, values = split_tables(table, scales, 3, shared)
    assert keys.shape == (3, groups if shared else groups // 3, 5, 16 // (keys.shape[1]))
    torch.testing.assert_close(keys.transpose(1, 2).flatten(2), key[0])
    torch.testing.assert_close(values.transpose(1, 2).flatten(2), value[0])


def test_unrotate_undoes_rotate() -> None:
    keys, angle = torch.randn(2, 3, 7, 16), torch.rand(1, 7, 8) * 6
    cos, sin = (torch.cat([t, t], -1) * 1.3 for t in (angle.cos(), angle.sin()))  # as yarn scales
    torch.testing.assert_close(unrotate(rotate(keys, (cos, sin)), (cos, sin)), keys)


def test_kmeans_finds_clusters() -> None:
    """With twice as many codewords as clusters, none is missed."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(2, 20, 8, generator=generator) * 10
    pick = torch.randint(0, 20, (600,), generator=generator)
    noise = torch.randn(600, 2, 8, generator=generator) * 0.1
    vectors = truth[:, pick].transpose(0, 1) + noise
    found = kmeans(vectors, 40, iterations=10)
    error = (vectors - ak.decode(ak.encode(vectors, found), found)).square().sum(-1).mean()
    assert float(error) < 8 * 0.1**2


def test_kmeans_lowers_the_error_and_is_deterministic() -> None:
    vectors = torch.randn(500, 3, 6, generator=torch.Generator().manual_seed(1))
    errors = []
    for iterations in (0, 1, 10):
        centers = kmeans(vectors, 32, iterations=iterations, seed=4)
        assert torch.equal(centers, kmeans(vectors, 32, iterations=iterations, seed=4))
        near = ak.decode(ak.encode(vectors, centers), centers)
        errors.append(float((vectors - near).square().sum(-1).mean()))
    assert errors[0] > errors[1] > errors[2]
    assert not torch.equal(centers, kmeans(vectors, 32, iterations=10, seed=5))


def test_dead_codewords_come_back() -> None:
    """More codewords than different vectors at first, then every codeword is used."""
    vectors = torch.cat([torch.zeros(200, 1, 2), torch.randn(64, 1, 2)])
    centers = kmeans(vectors, 64, iterations=12)
    assert len(ak.encode(vectors, centers).unique()) >= 60


def test_balance_gives_keys_and_values_equal_weight() -> None:
    key, value = torch.randn(1, 3, 400, 16) * 7 + 100, torch.randn(1, 3, 400, 16) * 0.2
    vectors = split_groups(key, value, balance(key, value), 3, False)
    spread = vectors.var(1).sum(0).unflatten(-1, (2, 16)).sum(-1)
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0.02, atol=0)


def small(**options: Any) -> tuple[Any, Codebook]:
    model = tiny("llama")
    options = {"groups": 3, "codewords": 32, "iterations": 3, "held_back": 0} | options
    return model, Codebook.fit(model, windows_for("llama"), **options)


def test_fit_is_deterministic_by_seed() -> None:
    digest = small()[1].digest
    assert small()[1].digest == digest
    assert small(seed=1)[1].digest != digest


def test_fit_evaluates_itself_and_says_when_codes_are_worse() -> None:
    _, book = small(held_back=2, world_size=2)
    told = book.notes["held_back"]
    assert told["windows"] == 2
    assert told["metric"] == "perplexity"
    assert told["exact"] > 1
    figures = {"exact": 10.0, "local_only": 20.0, "gap_recovered": 0.4}
    assert "40 % of the gap that remote tokens close is recovered" in verdict(
        told | figures | {"astra": 15}
    )
    assert "worse than dropping the remote tokens" in verdict(told | figures | {"astra": 20.1})
    useless = figures | {"astra": 9.0, "local_only": 9.5}
    assert "remote tokens are worth nothing" in verdict(told | useless)
    assert "not evaluated" in verdict(None)


def test_encoders_are_evaluated_by_their_output() -> None:
    """Images that are nearly one of two: their tokens fall on few codewords."""
    model, scenes = tiny("vit"), windows_for("vit", 2)
    images = scenes.repeat(6, 1, 1, 1) + 0.01 * torch.randn(12, 1, 20, 20)
    book = Codebook.fit(model, images, groups=12, codewords=64, held_back=2, world_size=2)
    told = book.notes["held_back"]
    assert told["metric"] == "error"
    assert 0 < told["astra"] < 0.2 * told["local_only"]
    assert told["gap_recovered"] == pytest.approx(1 - told["astra"] / told["local_only"])


def test_fit_reports_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    small(held_back=1, world_size=2, progress=lambda *step: seen.append(step))
    stages = list(dict.fromkeys(what for what, _, _ in seen))
    assert stages == ["calibrating", "clustering", "evaluating"]
    assert all(any((s, n, n) in seen for n in range(1, 10)) for s in stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "none"}, "space: expected 'kv', 'hidden', 'differential', 'transform', which"),
        ({"groups": 5}, "groups: expected one of 1, 2, 4, 8, 16 .*shared codes"),
        ({"groups": 9}, "groups: expected one of 3, 6, 12, 24, 48"),
        ({"groups": 9, "shared": False}, "groups: expected one of 3, 6, 12, 24, 48"),
        ({"space": "hidden", "groups": 5}, "groups: expected one of 1, 2, 3, 4, 6"),
        ({"space": "differential", "groups": 5}, "groups: expected one of 1, 2, 3, 4, 6"),
        ({"codewords": 241}, "at most the 240 calibration vectors, got 241"),
        ({"codewords": 1}, "codewords: expected 2 to 65536"),
        ({"held_back": 1, "world_size": 1}, "world_size: expected at least 2"),
        ({"held_back": 1, "world_size": 40}, "less than the 40 tokens of a window"),
    ],
)
def test_bad_fits_are_refused_before_any_work(options: dict[str, Any], message: str) -> None:
    def progress(*step: Any) -> None:
        pytest.fail(f"work was done: {step}")

    with pytest.raises(ValueError, match=message):
        small(**options, progress=progress)


def test_no_calibration_data_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one window"):
        Codebook.fit(tiny("llama"), [])


def test_activations_that_are_not_finite_are_refused() -> None:
    model = tiny("llama")
    projection = model.model.layers[1].self_attn.v_proj
    projection.register_forward_hook(lambda module, given, out: out * torch.nan)
    with pytest.raises(ValueError, match="activations of block 1 are not finite"):
        Codebook.fit(model, windows_for("llama"), groups=3, codewords=8)


def test_saved_codebooks_come_back(tmp_path: Path) -> None:
    model, book = small()
    book.save_pretrained(tmp_path)
    again = Codebook.from_pretrained(tmp_path)
    assert again.digest == book.digest
    assert again.notes == book.notes
    assert torch.equal(again.tables, book.tables)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "astra_config.json",
        "codebooks.safetensors",
    ]
    Engine(model, again).close()


def test_codebooks_compare_by_their_content(tmp_path: Path) -> None:
    _, book = small()
    book.save_pretrained(tmp_path)
    for twin in (Codebook.from_pretrained(tmp_path), pickle.loads(pickle.dumps(book))):
        assert twin == book
        assert len({twin, book}) == 1
    assert book == dataclasses.replace(book, notes={"other": 1})
    assert book not in (dataclasses.replace(book, prefix=1), Codebook.dense(), "a codebook")
    assert Codebook.none("int8") == Codebook.dense("int8") != Codebook.dense()
    assert Codebook.drop() == Codebook.local_only()


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    _, book = small()
    umask = os.umask(0o027)
    try:
        book.save_pretrained(tmp_path)
    finally:
        os.umask(umask)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
    assert modes == {CONFIG_FILE: "0o640", TENSOR_FILE: "0o640"}


def test_a_codebook_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, book = small()
    _, other = small(seed=1)
    book.save_pretrained(tmp_path)
    moves: list[Any] = []
    replace = os.replace

    def failing(source: Any, target: Any) -> None:
        moves.append(target)
        if len(moves) == 4:  # its first file has taken the place of the older one
            raise OSError("disk on fire")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk on fire"):
        other.save_pretrained(tmp_path)
    assert Codebook.from_pretrained(tmp_path) == book
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    _, book = small()
    book.save_pretrained(tmp_path)
    (tmp_path / TENSOR_FILE).chmod(0)
    with pytest.raises(PermissionError, match=TENSOR_FILE):
        Codebook.from_pretrained(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    _, book = small()
    with pytest.raises(FileNotFoundError, match=r"found no astra_config.json; make one with"):
        Codebook.from_pretrained(tmp_path)
    book.save_pretrained(tmp_path)
    tensors = tmp_path / "codebooks.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="is damaged: expected content"):
        Codebook.from_pretrained(tmp_path)
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        Codebook.from_pretrained(tmp_path)
    tensors.write_bytes(whole)
    config = json.loads((tmp_path / "astra_config.json").read_text())
    (tmp_path / "astra_config.json").write_text(json.dumps(config | {"groups": 6}))
    with pytest.raises(ValueError, match="is damaged"):
        Codebook.from_pretrained(tmp_path)
    (tmp_path / "astra_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Codebook.from_pretrained(tmp_path)


def test_codebooks_of_other_models_are_refused() -> None:
    _, book = small()
    with pytest.raises(ValueError, match="made for a model with weights"):
        Engine(tiny("llama", seed=9), book)
    with pytest.raises(ValueError, match="num_key_value_heads 3 .codebook. and 6 .model."):
        Engine(tiny("gpt2"), book)


def test_the_digest_names_configuration_and_weights() -> None:
    digests = {
        adapt(model).digest()
        for model in (tiny("llama"), tiny("llama", seed=1), tiny("llama", rms_norm_eps=1e-3))
    }
    assert len(digests) == 3
    with Engine(tiny("llama")) as engine:  # which changes the attention meanwhile
        assert engine.adapter.digest() in digests


def test_adapters_do_not_keep_models_alive() -> None:
    models = [tiny("llama"), tiny("llama").model]
    for model in models:
        Engine(model).close()
    gone = [weakref.ref(model) for model in models]
    del model
    models.clear()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_models_in_training_mode_are_refused() -> None:
    model = tiny("llama").train()
    for make in (lambda: Engine(model), lambda: Codebook.fit(model, windows_for("llama"))):
        with pytest.raises(ValueError, match="expected evaluation mode"):
            make()


def test_a_codebook_of_any_size_works() -> None:
    """K that is no power of two: unused code values are refused when they are received."""
    model, book = small(codewords=21)
    assert book.bits == 15
    with Engine(model, book) as engine:
        engine(**inputs_for("llama"))
