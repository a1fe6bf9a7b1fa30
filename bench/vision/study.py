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
from astra_runtime.train.finetune import Settings, finetune

from . import model as vit
from .data import TASKS, Images, compose
from .rows import Row, Size, Way

UNCODED = {"none": Codebook.none(), "drop": Codebook.drop()}


@dataclass
class Seed:
    """A model of its own seed for each task, and what was adapted from it.

    What is asked for twice is computed once; `keep` is a folder that keeps pre-trained models.
    """

    size: Size
    seed: int
    tests: dict[str, Images]
    keep: Path | None = None
    models: dict[Way, tuple[Any, Codebook]] = field(default_factory=dict)
    books: dict[tuple[str, str, int, float, int], Codebook] = field(default_factory=dict)
    found: dict[Any, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = self.size
        self.originals = pretrained(size, self.seed, self.keep)
        self.data = {
            task: compose("train", size.images, task, seed=1000 + self.seed, shift=1)
            for task in TASKS
        }

    def calibrated(self, way: Way) -> Codebook:
        """Codes from the calibration images; ways that differ in training start alike."""
        codewords = min(way.codewords, self.size.codewords)
        key = (way.task, way.space, way.groups, way.bits, codewords)
        if way.space in UNCODED:
            return UNCODED[way.space]
        if key not in self.books:
            self.books[key] = Codebook.fit(
                self.originals[way.task],
                self.data[way.task].pixels[: self.size.calibration],
                space=way.space,
                **({"bits": way.bits} if way.bits else {"groups": way.groups}),
                codewords=codewords,
                seed=self.seed,
                held_back=0,
            )
        return self.books[key]

    def steps(self, way: Way) -> int:
        return min(way.steps or self.size.adaptation, self.size.longest)

    def adapted(self, way: Way) -> tuple[Any, Codebook]:
        if not way.adapted:
            return self.originals[way.task], self.calibrated(way)
        if way not in self.models:
            model = copy.deepcopy(self.originals[way.task])
            settings = Settings(
                steps=self.steps(way),
                lr=self.size.lr,
                batch=self.size.batch,
                noise=way.noise,
                commitment=way.commitment,
                ranks=way.ranks,
                shard=2,
                single_class_token=way.single,
                seed=self.seed,
            )
            codebook = finetune(
                model,
                self.calibrated(way),
                self.data[way.task].pixels,
                settings,
                labels=self.data[way.task].labels,
                held_back=0,
            )
            self.models[way] = model, codebook
        return self.models[way]

    def accuracy(self, row: Row) -> float:
        """Percent of the test images."""
        if row not in self.found:
            model, codebook = self.adapted(row.way)
            self.found[row] = vit.accuracy(
                model,
                codebook,
                self.tests[row.way.task],
                row.world_size,
                single=row.way.single,
                lost=row.lost,
                seed=self.seed,
            )
        return self.found[row]

    def controls(self, like: Way, world_size: int) -> dict[str, float]:
        """With the same steps as `like`. Exact: the better of the original and the adapted model.
        int8: the same model's, by the engine. Local only: adapted to hear of no other shard."""
        task, steps = like.task, like.steps
        exact = Way(task, "none", steps=steps)
        best = max((Row(exact, 1), Row(replace(exact, adapted=False), 1)), key=self.accuracy)
        key = ("int8", task, steps, world_size)
        if key not in self.found:
            dense, model = Codebook.none("int8"), self.adapted(best.way)[0]
            self.found[key] = vit.engine_accuracy(model, dense, self.tests[task], world_size)
        return {
            "exact": self.accuracy(best),
            "int8": self.found[key],
            "local_only": self.accuracy(Row(Way(task, "drop", steps=steps), world_size)),
        }


def pretrained(size: Size, seed: int, keep: Path | None) -> dict[str, Any]:
    """The models of both tasks after training on one device."""
    model = vit.make(size.hidden, size.layers, size.heads, seed, size.mlp)
    path = None if keep is None else keep / f"vit-{size.hidden}-{size.pretraining}-{seed}.pt"
    if path is not None and path.is_file():
        made = {task: copy.deepcopy(model) for task in TASKS}
        for task, state in torch.load(path, weights_only=True).items():
            made[task].load_state_dict(state)
        return made
    head = vit.pretrain(model, steps=size.pretraining, batch=2 * size.batch, lr=1.5e-3, seed=seed)
    made = {"largest": model, "left": vit.reader(model, head)}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({task: model.state_dict() for task, model in made.items()}, path)
    return made


def measured(row: Row, seeds: list[Seed]) -> dict[str, Any]:
    """A row of the file: percent of the test images, mean and sample deviation over the seeds."""
    way, world_size = row.way, row.world_size
    ours = [seed.accuracy(row) for seed in seeds]
    controls = [seed.controls(way, world_size) for seed in seeds]
    mean = {name: statistics.mean(of[name] for of in controls) for name in controls[0]}
    below = [of["exact"] - accuracy for of, accuracy in zip(controls, ours, strict=True)]
    codebook, hidden = seeds[0].calibrated(way), seeds[0].size.hidden
    return {
        **asdict(way),
        "codes": way.name,
        "steps": seeds[0].steps(way),
        "codewords": codebook.codewords,
        "class_token": "single" if way.single else "distributed",
        "world_size": world_size,
        "lost": row.lost,
        "bits_per_token_block": codebook.bits,
        "compression": 32 * hidden / codebook.bits,
        "flops_over_ideal": flops_over_ideal(
            adapt(seeds[0].originals[way.task]), codebook, vit.TOKENS, world_size
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
