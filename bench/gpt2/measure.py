"""What is adapted and measured for `bench.gpt2`, and how a row of its result is made."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from astra_runtime import Codebook
from astra_runtime.console import say
from astra_runtime.costs import engine_plan, flops_over_ideal
from astra_runtime.models import Adapter, adapt
from astra_runtime.plan import Plan
from astra_runtime.train.finetune import finetune
from astra_runtime.train.schedule import Settings
from astra_runtime.train.simulate import Simulation
from bench import codebooks
from bench.gpt2 import KINDS
from bench.gpt2.model import Shape, Texts, language_loss, pretrain

RANKS = 4
NOISE, COMMITMENT = 0.1, 1e-4  # λ and β where nothing else is said
Pair = tuple[Any, Codebook]  # a model and the codebook that belongs to it


@dataclass(frozen=True)
class Codes:
    """A codebook to be made: of groups and codewords, or of `bits` a token and block."""

    space: str
    groups: int = 1
    codewords: int = 0
    bits: float = 0.0

    def __str__(self) -> str:
        return f"{self.space}:{self.bits or f'{self.groups}x{self.codewords}'}"

    @property
    def choice(self) -> dict[str, Any]:
        """What `Codebook.fit` is asked for."""
        if self.bits:
            return {"space": self.space, "bits": self.bits}
        return {"space": self.space, "groups": self.groups, "codewords": self.codewords}


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        bits: codes that are adapted; the `first` of them come first, and are also run with losses.
        plain: codes that are measured without adaptation only.
        base: what settings are varied on.
        steps, sweep_steps: of an adaptation, and of one in a sweep over settings.
        lr: learning rate of adaptations; the local-only control has another, with which it gets
            better: it has more to learn, and a weak control would flatter the codes.
    """

    shape: Shape
    bits: tuple[Codes, ...]
    plain: tuple[Codes, ...]
    base: Codes
    first: int = 3
    steps: int = 30
    sweep_steps: int = 15
    batch: int = 2
    lr: float = 2e-4
    lr_local_only: float = 1e-3
    calibration: int = 24
    windows: int = 16
    seeds: int = 3
    noise: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0)
    commitment: tuple[float, ...] = (0.0, 1e-4, 2e-4, 5e-4, 0.25)
    codewords: tuple[int, ...] = (64, 256, 1024, 4096)
    ranks: tuple[int, ...] = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Task:
    """A group of rows: codes or a control, before or after an adaptation.

    Attributes:
        steps: of the adaptation and its controls; 0: as many as `Size` says.
        changes: of the adaptation's `Settings`, which the rows then name.
        options: of `Bench.rows`.
    """

    group: str
    codes: Codes | Codebook
    adapted: bool = True
    steps: int = 0
    changes: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


class Bench:
    """The pre-trained model, its texts, and what has been adapted so far."""

    def __init__(self, size: Size) -> None:
        self.size, self.texts = size, Texts(size.shape)
        self.model = pretrain(size.shape, self.texts, say)
        self.original: Pair = self.model, Codebook.dense()
        self.windows = {
            (domain, kind): self.texts.windows(domain, kind, size.windows)
            for domain in size.shape.domains
            for kind in KINDS
        }
        self.losses: dict[tuple[Any, ...], Tensor] = {}
        self.pairs: dict[tuple[Any, ...], Pair] = {}
        self.fits: dict[tuple[Codes, int], Codebook] = {}

    def run(self, task: Task) -> list[dict[str, Any]]:
        codes, seeds, steps = task.codes, range(self.size.seeds), task.steps or self.size.steps
        if task.adapted:
            pairs = [self.adapted(codes, seed, steps, **task.changes) for seed in seeds]
        elif isinstance(codes, Codes):
            pairs = [self.fitted(codes, seed) for seed in seeds]
        else:
            pairs = [(self.model, codes)] * len(seeds)
        facts = {"adapted": task.adapted, "steps": steps, **task.changes, **task.options}
        return list(self.rows(task.group, pairs, **facts))

    # Adaptation.

    def fitted(self, codes: Codes, seed: int) -> Pair:
        """A codebook for the model as it was pre-trained."""
        if (codes, seed) not in self.fits:
            generator = torch.Generator().manual_seed(1000 + seed)
            self.fits[codes, seed] = Codebook.fit(
                self.model,
                self.texts.draw(self.size.calibration, generator),
                **codes.choice,
                iterations=4,
                seed=seed,
                held_back=0,
            )
        return self.model, self.fits[codes, seed]

    def adapted(self, codes: Codes | Codebook, seed: int, steps: int, **changes: Any) -> Pair:
        """Model and codebook (or a control) after an adaptation; `changes` are of `Settings`."""
        size = self.size
        local_only = isinstance(codes, Codebook) and codebooks.local_only(codes)
        settings = Settings(
            steps,
            lr=size.lr_local_only if local_only else size.lr,
            batch=size.batch,
            noise=NOISE,
            commitment=COMMITMENT,
            ranks=(RANKS, RANKS),
            warmup=5,
            seed=seed,
        )
        settings = replace(settings, **changes)
        key = (codebooks.label(codes) if isinstance(codes, Codebook) else codes, settings)
        if key not in self.pairs:
            data = self.texts.draw(size.batch * steps, torch.Generator().manual_seed(2000 + seed))
            book = codes if isinstance(codes, Codebook) else self.fitted(codes, seed)[1]
            model = copy.deepcopy(self.model)
            self.pairs[key] = model, finetune(model, book, data, settings, held_back=0)
        return self.pairs[key]

    # Evaluation.

    @torch.inference_mode()
    def loss(self, pair: Pair, text: tuple[str, str], ranks: int, lost: float, seed: int) -> float:
        """Nats a token, of the tokens after the first shard."""
        model, book = pair
        exact = codebooks.exact(book)  # whatever the ranks
        key = (
            id(model),
            id(book),
            *text,
            *(() if exact else (ranks, lost, seed if lost else 0)),
        )
        windows = self.windows[text]
        plan = self.plan(book, ranks)
        if key not in self.losses:
            generator = torch.Generator().manual_seed(3000 + seed)
            losses = []
            for few in windows.split(1 if lost else 8):  # losses are drawn by window
                inputs = {"input_ids": few}
                if exact:
                    output = model(**inputs)
                else:
                    run = Simulation(model, book, plan, inputs, lost=lost, generator=generator)
                    output = run.run()
                losses.append(language_loss(output.logits, few))
            self.losses[key] = torch.cat(losses)
        return float(self.losses[key][:, windows.shape[1] // ranks :].mean())

    def plan(self, book: Codebook, ranks: int) -> Plan:
        """Equal shards of what is behind the first tokens that every rank computes itself."""
        tokens = self.size.shape.tokens - book.prefix
        return Plan.make(tokens, ranks, causal=True, copies=book.prefix)

    def controls(
        self, text: tuple[str, str], ranks: int, seed: int, steps: int
    ) -> tuple[float, float]:
        """Nats a token of exact and local-only."""
        trained = self.adapted(Codebook.dense(), seed, steps)
        exact = min(self.loss(p, text, ranks, 0.0, seed) for p in (self.original, trained))
        local_only = self.adapted(Codebook.local_only(), seed, steps)
        return exact, self.loss(local_only, text, ranks, 0.0, seed)

    def rows(
        self,
        group: str,
        pairs: Sequence[Pair],
        *,
        steps: int,
        kinds: Sequence[str] = KINDS,
        ranks: int = RANKS,
        lost: float = 0.0,
        **facts: Any,
    ) -> Iterator[dict[str, Any]]:
        """A row for each text; `pairs` are those of the seeds, `facts` go into the rows."""
        book = pairs[0][1]
        for text in self.windows:
            if text[1] in kinds:
                losses = [self.loss(p, text, ranks, lost, i) for i, p in enumerate(pairs)]
                yield self.row(group, book, text, losses, ranks, lost, steps) | facts

    def row(
        self,
        group: str,
        book: Codebook,
        text: tuple[str, str],
        losses: Sequence[float],
        ranks: int,
        lost: float,
        steps: int,
    ) -> dict[str, Any]:
        shape, adapter = self.size.shape, adapt(self.model)
        against = [self.controls(text, ranks, seed, steps) for seed in range(len(losses))]
        return {
            "group": group,
            "space": codebooks.label(book),
            "groups": book.groups,
            "codewords": book.codewords,
            "domain": text[0],
            "seen_in_training": text[0] == shape.domains[0],
            "kind": text[1],
            "world_size": ranks,
            "lost": lost,
            "adaptation_steps": steps,
            **bits(book, adapter, shape),
            "flops_over_ideal": flops_over_ideal(
                adapter,
                book,
                shape.tokens,
                ranks,
                engine_plan(adapter, book, shape.tokens, ranks, halo=0),
            ),
            **summary(losses, against),
            "windows": self.size.windows,
        }


def bits(book: Codebook, adapter: Adapter, shape: Shape) -> dict[str, float | None]:
    """Bits a token and block, and how many times fewer than a block input in fp32."""
    count = codebooks.bits_per_token_block(book, adapter)
    return {
        "bits_per_token_block": count,
        "compression": 32 * shape.width / count if count else None,
    }


def summary(losses: Sequence[float], against: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Means and standard deviations over seeds, of losses beside (exact, local-only)."""
    ratios = [math.exp(loss - exact) for loss, (exact, _) in zip(losses, against, strict=True)]
    gaps = [
        (without - loss) / (without - exact) if without > exact else math.nan
        for loss, (exact, without) in zip(losses, against, strict=True)
    ]
    return {
        **spread("perplexity", [math.exp(loss) for loss in losses]),
        "exact": math.exp(statistics.mean(exact for exact, _ in against)),
        "dropped": math.exp(statistics.mean(without for _, without in against)),
        **spread("ratio_to_exact", ratios),
        **spread("gap_recovered", gaps),
        "dropped_over_exact": math.exp(statistics.mean(d - e for e, d in against)),
        "seeds": len(losses),
    }


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation; None where a value has no meaning."""
    if not all(math.isfinite(value) for value in values):
        return {name: None, f"{name}_std": None}
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {name: statistics.mean(values), f"{name}_std": deviation}


def described(bench: Bench) -> dict[str, Any]:
    """What was trained, and how."""
    size, shape = bench.size, bench.size.shape
    return {
        "parameters": sum(weight.numel() for weight in bench.model.parameters()),
        "width": shape.width,
        "layers": shape.layers,
        "vocabulary": shape.vocabulary,
        "tokens": shape.tokens,
        "pretraining_steps": shape.steps,
        "pretraining_tokens": shape.steps * shape.batch * shape.tokens,
        "seen": shape.seen,
        "unseen": shape.unseen,
        "adaptation": {
            "steps": size.steps,
            "sweep_steps": size.sweep_steps,
            "batch": size.batch,
            "lr": size.lr,
            "lr_dropped": size.lr_local_only,
            "noise": NOISE,
            "commitment": COMMITMENT,
            "calibration_windows": size.calibration,
        },
    }
