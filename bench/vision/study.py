"""One seed's models, and rows over all seeds."""

from __future__ import annotations

import copy
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from astra_runtime import Codebook
from astra_runtime.costs import flops_over_ideal
from astra_runtime.models import adapt
from astra_runtime.train.finetune import finetune
from astra_runtime.train.schedule import Settings
from bench import codebooks

from . import model as vit
from .data import TASKS, Images, compose
from .rows import Row, Size, Variant


@dataclass
class Seed:
    """A model of its own seed for each task, and what was adapted from it.

    What is asked for twice is computed once; `keep` is a folder that keeps pre-trained models.
    """

    size: Size
    seed: int
    tests: dict[str, Images]
    keep: Path | None = None
    models: dict[Variant, tuple[Any, Codebook]] = field(default_factory=dict)
    books: dict[tuple[str, str, int, float, int], Codebook] = field(default_factory=dict)
    accuracies: dict[Any, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.size
        self.originals = pretrained(size, self.seed, self.keep)
        self.data = {
            task: compose("train", size.images, task, seed=1000 + self.seed, shift=1)
            for task in TASKS
        }

    def calibrated(self, variant: Variant) -> Codebook:
        """Codes from the calibration images; variants that differ in training start alike."""
        codewords = min(variant.codewords, self.size.codewords)
        key = (variant.task, variant.space, variant.groups, variant.bits, codewords)
        control = codebooks.control(variant.space)
        if control is not None:
            return control
        if key not in self.books:
            self.books[key] = Codebook.fit(
                self.originals[variant.task],
                self.data[variant.task].pixels[: self.size.calibration],
                space=variant.space,
                **({"bits": variant.bits} if variant.bits else {"groups": variant.groups}),
                codewords=codewords,
                seed=self.seed,
                held_back=0,
            )
        return self.books[key]

    def steps(self, variant: Variant) -> int:
        return min(variant.steps or self.size.adaptation, self.size.longest)

    def adapted(self, variant: Variant) -> tuple[Any, Codebook]:
        if not variant.adapted:
            return self.originals[variant.task], self.calibrated(variant)
        if variant not in self.models:
            model = copy.deepcopy(self.originals[variant.task])
            settings = Settings(
                steps=self.steps(variant),
                lr=self.size.lr,
                batch=self.size.batch,
                noise=variant.noise,
                commitment=variant.commitment,
                ranks=variant.ranks,
                shard=2,
                single_class_token=variant.single,
                seed=self.seed,
            )
            codebook = finetune(
                model,
                self.calibrated(variant),
                self.data[variant.task].pixels,
                settings,
                labels=self.data[variant.task].labels,
                held_back=0,
            )
            self.models[variant] = model, codebook
        return self.models[variant]

    def accuracy(self, row: Row) -> float:
        """Percent of the test images."""
        if row not in self.accuracies:
            model, codebook = self.adapted(row.variant)
            self.accuracies[row] = vit.accuracy(
                model,
                codebook,
                self.tests[row.variant.task],
                row.world_size,
                single=row.variant.single,
                lost=row.lost,
                seed=self.seed,
            )
        return self.accuracies[row]

    def controls(self, like: Variant, world_size: int) -> dict[str, float]:
        """With the same steps as `like`. Exact: the better of the original and the adapted model.
        int8: the same model's, by the engine. Local only: adapted to see no other shard."""
        task, steps = like.task, like.steps
        exact = Variant(task, "none", steps=steps)
        best = max((Row(exact, 1), Row(replace(exact, adapted=False), 1)), key=self.accuracy)
        key = ("int8", task, steps, world_size)
        if key not in self.accuracies:
            dense, model = Codebook.dense("int8"), self.adapted(best.variant)[0]
            self.accuracies[key] = vit.engine_accuracy(model, dense, self.tests[task], world_size)
        return {
            "exact": self.accuracy(best),
            "int8": self.accuracies[key],
            "local_only": self.accuracy(Row(Variant(task, "drop", steps=steps), world_size)),
        }


def pretrained(size: Size, seed: int, keep: Path | None) -> dict[str, Any]:
    """The models of both tasks after training on one device."""
    model = vit.make(size.hidden, size.layers, size.heads, seed, size.mlp)
    path = None if keep is None else keep / f"vit-{size.hidden}-{size.pretraining}-{seed}.pt"
    if path is not None and path.is_file():
        models = {task: copy.deepcopy(model) for task in TASKS}
        for task, state in torch.load(path, weights_only=True).items():
            models[task].load_state_dict(state)
        return models
    head = vit.pretrain(model, steps=size.pretraining, batch=2 * size.batch, lr=1.5e-3, seed=seed)
    models = {"largest": model, "left": vit.reader(model, head)}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({task: model.state_dict() for task, model in models.items()}, path)
    return models


def measured(row: Row, seeds: list[Seed]) -> dict[str, Any]:
    """A row of the file: percent of the test images, mean and sample deviation over the seeds."""
    variant, world_size = row.variant, row.world_size
    ours = [seed.accuracy(row) for seed in seeds]
    controls = [seed.controls(variant, world_size) for seed in seeds]
    mean = {name: statistics.mean(of[name] for of in controls) for name in controls[0]}
    below = [of["exact"] - accuracy for of, accuracy in zip(controls, ours, strict=True)]
    codebook, hidden = seeds[0].calibrated(variant), seeds[0].size.hidden
    return {
        **asdict(variant),
        "codes": variant.name,
        "steps": seeds[0].steps(variant),
        "codewords": codebook.codewords,
        "class_token": "single" if variant.single else "distributed",
        "world_size": world_size,
        "lost": row.lost,
        "bits_per_token_block": codebook.bits,
        "compression": 32 * hidden / codebook.bits,
        "flops_over_ideal": flops_over_ideal(
            adapt(seeds[0].originals[variant.task]), codebook, vit.TOKENS, world_size
        ),
        "accuracy_mean": statistics.mean(ours),
        "accuracy_std": deviation(ours),
        "accuracies": ours,
        "n_seeds": len(ours),
        **mean,
        "below_exact": statistics.mean(below),
        "below_exact_std": deviation(below),
        "dropping_costs": mean["exact"] - mean["local_only"],
        "calibration_vectors": codebook.notes.get("calibration_vectors"),
    }


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def goal(row: dict[str, Any], compression: float, permitted: float) -> dict[str, Any]:
    """A row against the points it may lose at a compression.

    A case counts where dropping all remote tokens costs three times as much.
    """
    return {
        "task": row["task"],
        "codes": row["codes"],
        "world_size": row["world_size"],
        "compression": compression,
        "row_compression": row["compression"],
        "permitted": permitted,
        "below_exact": row["below_exact"],
        "dropping_costs": row["dropping_costs"],
        "counts": row["dropping_costs"] >= 3 * permitted,
        "reached": row["below_exact"] <= permitted,
    }
