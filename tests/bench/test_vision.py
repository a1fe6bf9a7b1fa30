"""The vision bench with tiny sizes: its images, its two ways to count, its file, its tables."""

from __future__ import annotations

import itertools
import json

import pytest

from astra_runtime import Codebook
from bench.vision import __main__ as program
from bench.vision import model as vit
from bench.vision import tables as tables_vision
from bench.vision.data import PARTS, compose, load
from bench.vision.rows import groups

ROW = {
    *("group", "task", "codes", "bits_per_token_block", "compression", "flops_over_ideal"),
    *("accuracy_mean", "accuracy_std", "n_seeds", "exact", "int8", "local_only", "world_size"),
    *("below_exact", "below_exact_std", "noise", "commitment", "ranks", "class_token", "lost"),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    few = ["goals", "class token", "loss"]
    path = program.main(["--quick", "--output", str(folder), "--groups", *few])
    return json.loads(path.read_text())


def test_rows_of_other_groups_can_be_kept(report, tmp_path):
    path = tmp_path / "file.json"
    assert program.earlier(path, ["loss"]) == ([], 0)
    path.write_text(json.dumps(report))
    rows, seconds = program.earlier(path, ["loss"])
    assert {row["group"] for row in rows} == {"goals", "class token"}
    assert seconds == report["seconds"]


def test_rows_have_what_was_agreed(report):
    assert not report["complete"]
    assert {row["group"] for row in report["rows"]} == {"goals", "class token", "loss"}
    assert len(report["rows"]) == sum(
        len(groups()[name]) for name in ("goals", "class token", "loss")
    )
    for row in report["rows"]:
        assert set(row) >= ROW
        assert row["n_seeds"] == 2
        assert 0 <= row["accuracy_mean"] <= 100
    assert {row["class_token"] for row in report["rows"]} == {"single", "distributed"}
    assert {row["lost"] for row in report["rows"]} == {0, 0.05}
    assert {(goal["task"], goal["permitted"]) for goal in report["goals"]} == {
        ("largest", permitted) for permitted in (0.9, 3.6)
    }


def test_tables_show_every_row(report):
    shown = "".join(table.make(report) for table in tables_vision.TABLES.values())
    assert "python -m bench.vision" in shown
    for row in report["rows"]:
        assert f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}" in shown


def test_the_wider_model_has_a_file_of_its_own(tmp_path):
    path = program.main(["--quick", "--wide", "--seeds", "1", "--output", str(tmp_path)])
    assert path.name == "accuracy_vision_wide_quick.json"
    report = json.loads(path.read_text())
    assert [row["world_size"] for row in report["rows"]] == [4, 2]
    assert [goal["permitted"] for goal in report["goals"]] == [0.9, 0.9]
    assert "with N=2" in tables_vision.vision_wide(report)


def test_every_group_has_rows():
    assert all(groups().values())


def test_digits_of_parts_are_disjoint():
    bounds = sorted(PARTS.values())
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(bounds))


def test_images_show_their_digits():
    pixels, kinds = load("test")
    images = compose("test", 8, "largest", seed=0)
    for image, label, digits in zip(images.pixels, images.labels, images.digits, strict=True):
        halves = image[0].split(8, dim=1)
        for half, digit in zip(halves, digits, strict=True):
            same = (pixels == half).flatten(1).all(1)
            assert digit in kinds[same]
        assert label == digits.max()


def test_digits_move_by_a_pixel():
    still, moved = (compose("train", 64, "left", seed=0, shift=shift) for shift in (0, 1))
    assert still.digits.equal(moved.digits)
    middle = still.pixels[:, :, 1:7, 1:7].eq(moved.pixels[:, :, 1:7, 1:7]).flatten(1).all(1)
    assert 0 < int(middle.sum()) < 32  # one of nine does not move


def test_the_simulation_counts_what_the_engine_counts():
    model = vit.make(32, 2, 2, seed=0)
    images = compose("test", 64, "largest", seed=0)
    data = compose("train", 16, "largest", seed=0).pixels
    book = Codebook.fit(model, data, space="hidden", groups=4, codewords=16, held_back=0)
    simulated = vit.accuracy(model, book, images, 4)
    assert simulated == vit.engine_accuracy(model, book, images, 4)
