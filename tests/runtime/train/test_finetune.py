"""Adaptation on tiny models: it lowers its loss, resumes bit-identically, serves the engine."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from astra_runtime import Codebook, Engine
from astra_runtime.evaluate import run_ranks
from astra_runtime.models import adapt
from astra_runtime.store import load_model
from astra_runtime.train.finetune import (
    CHECKPOINT,
    Step,
    TrainingFailed,
    finetune,
    save_result,
)
from astra_runtime.train.schedule import Settings, draw_plan, schedule
from astra_runtime.transport import Mesh

from ..models import inputs_for, tiny, windows_for

QUICK = Settings(steps=6, lr=1e-3, batch=2, ranks=(2, 4), shard=4)


def corpus(count: int = 16, tokens: int = 40) -> Tensor:
    """Sentences of one rule: each token is the one before plus a step that the window keeps."""
    start, step = torch.arange(count)[:, None] * 5, torch.arange(count)[:, None] % 3 + 1
    return (start + step * torch.arange(tokens)) % 97


def fitted(model: Any, windows: Tensor, space: str = "kv", groups: int = 3) -> Codebook:
    return Codebook.fit(
        model, windows, space=space, groups=groups, codewords=16, iterations=2, held_back=0
    )


@pytest.mark.parametrize("space", ["kv", "hidden", "differential"])
def test_the_loss_goes_down(space: str) -> None:
    model, data = tiny("llama", initializer_range=0.1), corpus()
    book = fitted(model, data, space)
    steps: list[Step] = []
    settings = Settings(steps=20, lr=4e-3, batch=4, ranks=(2, 4), shard=4, commitment=1e-2)
    made = finetune(model, book, data, settings, world_size=3, report=steps.append)
    looked = [step.measured for step in steps if step.measured is not None]
    losses = [step.loss for step in steps if step.measured is None]
    assert len(losses) == 20
    assert {step.world_size for step in steps if step.world_size} == {2, 3, 4}
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert looked[-1].astra < 0.8 * looked[0].astra  # by the engine, on windows held back
    assert made.notes["held_back"]["astra"] == looked[-1].astra
    made.check_model(adapt(model))
    assert made.digest != book.digest


def test_commitment_is_part_of_what_is_lowered() -> None:
    """With a heavy weight, activations come to lie closer to their codewords."""
    errors = []
    for commitment in (0.0, 2.0):
        model, data = tiny("gpt2", initializer_range=0.1), corpus()
        steps: list[Step] = []
        settings = Settings(
            steps=10, lr=2e-3, batch=4, ranks=(2, 2), shard=4, commitment=commitment, noise=0.0
        )
        made = finetune(
            model, fitted(model, data, "hidden"), data, settings, held_back=0, report=steps.append
        )
        last = Settings(steps=1, lr=1e-9, batch=16, ranks=(2, 2), shard=4, commitment=1.0)
        finetune(model, made, data, last, held_back=0, report=steps.append)
        errors.append(steps[-1].commitment)
    assert errors[1] < 0.5 * errors[0]


class Stopped(Exception):
    pass


def stop_at(number: int) -> Callable[[Step], None]:
    def report(step: Step) -> None:
        if step.step == number:
            raise Stopped

    return report


@pytest.mark.parametrize("space", ["kv", "differential"])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, space: str) -> None:
    data = corpus()
    models = [tiny("llama") for _ in range(3)]
    book = fitted(models[0], data, space)
    options: dict[str, Any] = {"world_size": 2, "evaluate_every": 2, "checkpoint_every": 2}
    whole = finetune(models[0], book, data, QUICK, **options)
    with pytest.raises(Stopped):
        finetune(models[1], book, data, QUICK, folder=tmp_path, report=stop_at(5), **options)
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]
    steps: list[Step] = []
    resumed = finetune(
        models[2], book, data, QUICK, folder=tmp_path, resume=True, report=steps.append, **options
    )
    assert [step.step for step in steps if step.measured is None] == [5, 6]
    assert resumed.digest == whole.digest
    assert json.dumps(resumed.notes) == json.dumps(whole.notes)  # a gap may be nan
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[2].state_dict()[name]), name


def test_a_full_disk_takes_away_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"a part")
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")

    monkeypatch.setattr(torch, "save", full)
    model, data = tiny("llama"), corpus()
    options: dict[str, Any] = {"folder": tmp_path, "held_back": 0, "checkpoint_every": 3}
    assert finetune(model, fitted(model, data), data, QUICK, **options).coded
    assert caplog.text.count("has no checkpoint: PytorchStreamWriter failed") == 2
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    data, model = corpus(), tiny("llama")
    book = fitted(model, data)
    fresh = copy.deepcopy(model)
    with pytest.raises(FileNotFoundError, match="resume: found no checkpoint"):
        finetune(fresh, book, data, QUICK, folder=tmp_path, resume=True)
    finetune(model, book, data, QUICK, folder=tmp_path, held_back=0, checkpoint_every=6)
    options: dict[str, Any] = {"folder": tmp_path, "held_back": 0, "resume": True}
    other = Settings(steps=6, lr=2e-3, batch=2, ranks=(2, 4), shard=4)
    with pytest.raises(TrainingFailed, match=r"another run: lr 0\.001 \(checkpoint\) and 0\.002"):
        finetune(fresh, book, data, other, **options)
    with pytest.raises(TrainingFailed, match="another run: data"):
        finetune(fresh, book, data.flip(0), QUICK, **options)
    with pytest.raises(TrainingFailed, match="another run: model"):
        finetune(model, Codebook.drop(), data, QUICK, **options)
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(TrainingFailed, match="cannot be read"):
        finetune(fresh, book, data, QUICK, **options)


@pytest.mark.parametrize("single", [False, True])
def test_classifiers_learn_from_labels(single: bool) -> None:
    model = tiny("vit", initializer_range=0.1)
    images = windows_for("vit", 24)
    labels = (torch.arange(24) % 2).long()
    images[labels == 1] += 1.0
    book = fitted(model, images, groups=6)
    steps: list[Step] = []
    settings = Settings(
        steps=12, lr=3e-3, batch=8, ranks=(2, 4), shard=2, single_class_token=single
    )
    finetune(model, book, images, settings, labels=labels, world_size=2, report=steps.append)
    losses = [step.loss for step in steps if step.measured is None]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_encoders_learn_to_answer_as_before() -> None:
    model = tiny("bert", initializer_range=0.1)
    data = windows_for("bert", 16)
    steps: list[Step] = []
    settings = Settings(steps=15, lr=2e-3, batch=4, ranks=(2, 3), shard=4, noise=0.3)
    finetune(model, fitted(model, data, groups=6), data, settings, report=steps.append)
    losses = [step.loss for step in steps if step.measured is None]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("control", [Codebook.none(), Codebook.drop()])
def test_controls_train_without_codes(control: Codebook) -> None:
    model, data = tiny("gpt2", initializer_range=0.1), corpus()
    steps: list[Step] = []
    settings = Settings(steps=12, lr=5e-3, batch=4, ranks=(2, 4), shard=4)
    assert finetune(model, control, data, settings, report=steps.append).space == control.space
    losses = [step.loss for step in steps if step.measured is None]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all(step.commitment == 0 for step in steps if step.measured is None)


def test_the_result_serves_the_engine(tmp_path: Path) -> None:
    model, data = tiny("llama"), corpus()
    made = finetune(model, fitted(model, data), data, QUICK, held_back=0)
    save_result(model, made, tmp_path / "adapted")
    loaded = load_model(str(tmp_path / "adapted"))
    book = Codebook.from_pretrained(tmp_path / "adapted")
    assert not list((tmp_path / "adapted").glob(".part*"))

    def work(mesh: Mesh) -> Tensor:
        with Engine(loaded, book, mesh) as engine:
            return engine(**inputs_for("llama")).logits

    assert bool(run_ranks(2, work, timeout=30)[0].isfinite().all())


def test_plans_keep_to_the_settings() -> None:
    settings = Settings(steps=1, ranks=(2, 5), shard=6)
    adapter, generator = adapt(tiny("gpt2")), torch.Generator().manual_seed(0)
    plans = [draw_plan(40, adapter, settings, generator) for _ in range(2000)]
    assert {plan.world_size for plan in plans} == {2, 3, 4, 5}
    sizes = [[plan.size(n) for n in range(plan.world_size)] for plan in plans]
    assert min(map(min, sizes)) == 6
    assert all(sum(of_plan) == 40 for of_plan in sizes)
    assert {of_plan[0] for of_plan in sizes if len(of_plan) == 2} == set(range(6, 35))
    tight = Settings(steps=1, ranks=(4, 4), shard=10)
    assert draw_plan(40, adapter, tight, generator).bounds == (0, 10, 20, 30, 40)


def test_the_learning_rate_rises_and_falls() -> None:
    settings = Settings(steps=100, warmup=10)
    shares = [schedule(step, settings) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert shares[10] == 1.0
    assert sorted(shares[10:], reverse=True) == shares[10:]
    assert 0 < shares[-1] < 0.01
    assert schedule(0, Settings(steps=1)) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"lr": math.nan}, "lr: expected more than 0"),
        ({"ranks": (3, 2)}, "ranks: expected"),
        ({"shard": 11}, "shard: expected at most 10 tokens"),
        ({"noise": -1.0}, "noise: expected 0 or more"),
    ],
)
def test_settings_without_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    model, data = tiny("llama"), corpus()
    settings = Settings(**({"steps": 1, "ranks": (2, 4), "shard": 4} | changes))
    with pytest.raises(ValueError, match=message):
        finetune(model, fitted(model, data), data, settings)


def test_bad_models_and_data_are_refused() -> None:
    model, data = tiny("llama"), corpus()
    book = fitted(model, data)
    with pytest.raises(ValueError, match="made for a model with weights"):
        finetune(tiny("llama", seed=5), book, data, QUICK)
    with pytest.raises(ValueError, match="expected at least one window"):
        finetune(model, book, [], QUICK)
    with pytest.raises(ValueError, match="windows of one length"):
        finetune(model, book, [data[0], data[1, :30]], QUICK)
    with pytest.raises(ValueError, match="world_size: expected at least 2"):
        finetune(model, book, data, QUICK, world_size=40)
    with pytest.raises(ValueError, match="labels: expected a model with a classifier"):
        finetune(model, book, data, QUICK, labels=torch.zeros(16, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected evaluation mode"):
        finetune(model.train(), book, data, QUICK)
    with pytest.raises(ValueError, match="expected fp32 weights"):
        finetune(model.eval().double(), book, data, QUICK)


def test_classes_that_there_are_not_are_refused() -> None:
    model, images = tiny("vit"), windows_for("vit", 8)
    book, settings = fitted(model, images, groups=6), Settings(steps=1, ranks=(2, 2), shard=2)
    for labels, message in (
        (torch.zeros(7, dtype=torch.int64), "one a window"),
        (torch.full((8,), 2), "expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(model, book, images, settings, labels=labels)
    images[3, 0, 1, 1] = math.nan
    with pytest.raises(ValueError, match="window 3: pixel_values: expected finite values"):
        finetune(model, book, images, settings)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model, data = tiny("gpt2"), corpus()
    settings = Settings(steps=5, lr=1e30, batch=2, ranks=(2, 2), shard=4)
    with pytest.raises((TrainingFailed, ValueError), match="the loss is|activations: expected"):
        finetune(model, Codebook.none(), data, settings, held_back=0)
    broken = tiny("gpt2")
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="weights that are not finite: transformer.h.1.mlp"):
        finetune(broken, Codebook.none(), data, settings)


Run = Callable[..., tuple[str, str]]


def test_the_command_end_to_end(home: Path, here: Run, tmp_path: Path) -> None:
    common = ["--model", str(home / "model"), "--codebook", str(home / "codebook")]
    common += ["--output", str(tmp_path / "adapted"), "--text", str(home / "text.txt")]
    common += ["--tokens", "40", "--batch", "2", "--min-shard", "4", "--max-ranks", "4"]
    common += ["--world-size", "2", "--steps", "4", "--evaluate-every", "2"]
    out, err = here("finetune", *common, "--json")
    found = json.loads(out)
    assert len(found["loss"]) == 4
    assert [told["step"] for told in found["measured"]] == [0, 2, 4]
    assert "step 4/4: loss" in err
    assert "step 2/4: held out: perplexity" in err
    adapted = ["--model", str(tmp_path / "adapted"), "--codebook", str(tmp_path / "adapted")]
    told = here("run", *adapted, "--prompt", "w1 w2 w3", "--max-new-tokens", "2", "--json")[0]
    assert len(json.loads(told)["text"].split()) == 2
    assert "resume: found no checkpoint" in here("finetune", *common, "--resume", code=1)[1]


def test_the_command_trains_controls(home: Path, here: Run, tmp_path: Path) -> None:
    here(  # windows so short that eight devices have fewer than 16 tokens each
        "finetune", "--model", str(home / "model"), "--control", "local-only",
        "--output", str(tmp_path), "--text", str(home / "text.txt"), "--tokens", "40",
        "--steps", "1", "--held-back", "0",
    )  # fmt: skip
    assert (tmp_path / "config.json").is_file()
    assert not (tmp_path / "astra_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--codebook", "other"], "made for a model with weights"),
        (["--codebook", "nowhere"], "found no astra_config.json"),
        (["--text", "empty.txt"], "text: expected at least 40 tokens, got 0"),
        (["--text", "short.txt"], "text: expected at least 40 tokens, got 3"),
        (["--max-ranks", "11"], "shard: expected at most 3 tokens"),
    ],
)
def test_the_command_refuses_bad_input(
    home: Path,
    here: Run,
    tmp_path: Path,
    changes: list[str],
    message: str,
) -> None:
    (home / "empty.txt").write_text("")
    (home / "short.txt").write_text("w1 w2 w3")
    given = {
        "--model": "model",
        "--codebook": "codebook",
        "--text": "text.txt",
        "--tokens": "40",
        "--min-shard": "4",
    }
    given |= {changes[0]: changes[1]}
    paths = ("--model", "--codebook", "--text")
    arguments = [
        part
        for name, value in given.items()
        for part in (name, str(home / value) if name in paths else value)
    ]
    error = here("finetune", *arguments, "--output", str(tmp_path), code=1)[1]
    assert message in error
