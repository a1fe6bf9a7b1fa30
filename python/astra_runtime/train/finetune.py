"""NAVQ adaptation: a model and its codebook are trained to work with each other.

Each step draws N and the shard boundaries anew and runs the N devices as one pass (`simulate.py`),
so that the result serves any number of devices. The loss is the task's plus the commitment of all
blocks (`navq.py`); codebooks follow by moving averages. What is random depends on the seed and the
number of the step only, or is part of the checkpoint: a resumed run ends in the same bits (on CUDA,
as far as torch's own operations are deterministic).
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codes.codebook import Codebook
from ..errors import AstraError
from ..evaluate import Measured, answer_of, measure
from ..files import written_together
from ..models import Adapter, Inputs, adapt, is_language_model
from .calibration import as_windows, check_weights, check_windows, on_device
from .navq import NAVQ
from .schedule import Settings, draw_plan, schedule
from .simulate import Simulation, quantizers

CHECKPOINT, PART = "checkpoint.pt", ".part"

log = logging.getLogger("astra_runtime.train")


class TrainingFailed(AstraError):
    """The loss left the numbers, or a checkpoint belongs to another run."""


@dataclass(frozen=True)
class Step:
    """What is known after a step.

    Attributes:
        step: how many are done; 0 before the first, where only `measured` is known.
        loss: the task's loss, of language models in nats a token.
        commitment: β times a token's squared errors, summed over blocks.
        world_size: the N that was drawn.
        measured: the held-out windows, when it was time to look.
    """

    step: int
    steps: int
    loss: float = math.nan
    commitment: float = math.nan
    world_size: int = 0
    measured: Measured | None = None


Report = Callable[[Step], None]


def finetune(
    model: nn.Module,
    codebook: Codebook,
    data: Tensor | Sequence[Tensor],
    settings: Settings,
    *,
    labels: Tensor | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    held_back: int = 2,
    world_size: int = 4,
    evaluate_every: int = 0,
    checkpoint_every: int = 0,
    report: Report = lambda step: None,
) -> Codebook:
    """Adapts `model`, in place, and `codebook` to each other.

    Args:
        model: a supported Hugging Face model in fp32, in evaluation mode, which it stays in: NAVQ's
            noise is the only one. On CUDA the passes run in bf16 by autocast.
        codebook: where the codewords start. `Codebook.dense()` and `Codebook.local_only()` train
            the controls: exact attention, and shards that do not know of each other.
        data: token windows int64 [W, T], or a list of [T], all of one length; or images
            [W, C, h, w]. Never what is evaluated on.
        labels: int64 [W], the class of each window: the loss is the classifier's cross entropy.
            None: a language model predicts the next token; any other model is to give, of coded
            tokens, the output that it gave before the adaptation without codes (mean squared error
            over the output's variance).
        folder: where checkpoints go, every `checkpoint_every` steps (0: none).
        resume: go on from the checkpoint in `folder`; all else has to be as it was.
        held_back: held-out windows, which `report` tells of at the start, every
            `evaluate_every` steps (0: never in between) and at the end, as `world_size` ranks.

    Returns:
        The codebook that belongs to the model as it now is; its notes tell of the run.

    Raises:
        ValueError: a codebook made for another model, settings that do not fit the data,
            activations that are not finite.
        TrainingFailed: the loss is not finite; the checkpoint is of another run.
    """
    training = _Training(model, codebook, data, labels, settings, held_back)
    if training.held_out and not 2 <= world_size < training.tokens:
        raise ValueError(
            f"world_size: expected at least 2 and less than the {training.tokens} tokens of a "
            f"window, got {world_size}"
        )
    path = None if folder is None else Path(folder) / CHECKPOINT
    if resume:
        training.load(path)
    with training.adapter.installed():
        if not training.done:
            training.measure(world_size, report)
        while training.done < settings.steps:
            report(training.step())
            last = training.done == settings.steps
            if last or (evaluate_every and training.done % evaluate_every == 0):
                training.measure(world_size, report)
            if path is not None and checkpoint_every and training.done % checkpoint_every == 0:
                training.try_to_save(path)
    return training.result(world_size)


class _Training:
    """Model, quantizers and optimizer between two steps."""

    def __init__(
        self,
        model: nn.Module,
        codebook: Codebook,
        data: Tensor | Sequence[Tensor],
        labels: Tensor | None,
        settings: Settings,
        held_back: int,
    ) -> None:
        self.model, self.start, self.settings = model, codebook, settings
        self.adapter: Adapter = adapt(model)
        _check_model(model, codebook, self.adapter)
        windows = as_windows(data)
        self.tokens = _check_windows(windows, self.adapter)
        settings.check(self.tokens - codebook.prefix)
        _check_labels(labels, len(windows), model)
        out = _apart(len(windows), held_back)
        device = self.adapter.device
        self.held_out = [on_device(windows[i], self.adapter) for i in sorted(out)]
        self.indices = [i for i in range(len(windows)) if i not in out]
        self.windows, self.labels = windows, labels
        self.quantizers = quantizers(
            codebook,
            device,
            noise=settings.noise,
            commitment=settings.commitment,
            decay=settings.decay,
            seed=settings.seed,
        )
        self.teacher = None
        if labels is None and not is_language_model(model):
            self.teacher = copy.deepcopy(model)
        self.weights = [w for w in model.parameters() if w.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.done = 0
        self.measured: list[dict[str, Any]] = []
        self.identity = self._identity()

    # One step.

    def step(self) -> Step:
        """Draws windows and a plan, and moves weights and codebooks."""
        settings, number = self.settings, self.done
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        inputs, labels = self._batch(generator)
        plan = draw_plan(self.tokens, self.adapter, settings, generator, self.start.prefix)
        run = Simulation(
            self.model,
            self.start,
            plan,
            inputs,
            self.quantizers,
            single_class_token=settings.single_class_token,
        )
        device = self.adapter.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = self._loss(run.run(), inputs, labels)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + run.commitment).backward()
        norm = nn.utils.clip_grad_norm_(self.weights, 1.0)
        value, commitment = float(loss.detach()), float(run.commitment.detach())
        if not math.isfinite(value + commitment + float(norm)):
            raise TrainingFailed(
                f"step {number + 1}: the loss is {value}, its gradient's norm {float(norm)}; "
                "try a lower learning rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * schedule(number, settings)
        self.optimizer.step()
        self.done += 1
        return Step(self.done, settings.steps, value, commitment, plan.world_size)

    def _batch(self, generator: torch.Generator) -> tuple[Inputs, Tensor | None]:
        order = torch.randperm(len(self.indices), generator=generator)[: self.settings.batch]
        chosen = [self.indices[i] for i in order.tolist()]
        name = next(iter(self.windows[0]))
        inputs = {name: torch.cat([self.windows[i][name] for i in chosen])}
        labels = None if self.labels is None else self.labels[chosen].to(self.adapter.device)
        return on_device(inputs, self.adapter), labels

    def _loss(self, output: Any, inputs: Inputs, labels: Tensor | None) -> Tensor:
        if labels is not None:
            return F.cross_entropy(output.logits.float(), labels)
        if self.teacher is None:
            predicted = output.logits[:, :-1].float().flatten(0, 1)
            return F.cross_entropy(predicted, inputs["input_ids"][:, 1:].flatten())
        with torch.no_grad():
            wanted = answer_of(self.teacher(**inputs)).float()
            spread = wanted.var(correction=0)
            # of a single number a window the batch may hold one only
            spread = torch.where(spread > 0, spread, wanted.square().mean())
        error = (answer_of(output).float() - wanted).square().mean()
        return error / spread

    # Looking at the result.

    def codebook(self) -> Codebook:
        """The codewords as they are now, for the model as it is now."""
        if not self.start.coded:
            return self.start
        tables = [
            layer.tables.cpu() if isinstance(layer, NAVQ) else table  # nothing of the block is sent
            for layer, table in zip(self.quantizers, self.start.block_tables, strict=True)
        ]
        trained = self.start.with_tables(tables)
        return replace(trained, model=self.adapter.digest(), notes={})

    def measure(self, world_size: int, report: Report) -> None:
        """Runs the held-out windows through the engine itself, beside both controls."""
        if not self.held_out:
            return
        measured = measure(self.model, self.codebook(), self.held_out, world_size=world_size)
        figures = {"step": self.done, "gap_recovered": measured.gap_recovered}
        self.measured.append(asdict(measured) | figures)
        report(Step(self.done, self.settings.steps, measured=measured))

    def result(self, world_size: int) -> Codebook:
        codebook = self.codebook()
        started = {"digest": self.start.digest, **self.start.notes}
        for measured in ("held_back", "left_out"):
            started.pop(measured, None)
        codebook = replace(
            codebook, notes={"finetuned": asdict(self.settings), "started_from": started}
        )
        shares = [layer.left_out for layer in self.quantizers if isinstance(layer, NAVQ)]
        if len(shares) == len(self.quantizers) and not codebook.codec.accumulates:
            codebook = codebook.with_left_out(shares)
        if self.measured:
            last = self.measured[-1] | {"windows": len(self.held_out), "world_size": world_size}
            codebook.notes.update(held_back=last, measured=self.measured)
        return codebook

    # Checkpoints.

    def _identity(self) -> dict[str, Any]:
        """What has to be as it was for a checkpoint to fit."""
        content = sha256()
        for window in self.windows:
            for tensor in window.values():
                content.update(tensor.cpu().contiguous().numpy().tobytes())
        if self.labels is not None:
            content.update(self.labels.cpu().contiguous().numpy().tobytes())
        return {
            **asdict(self.settings),
            "ranks": list(self.settings.ranks),
            "model": self.adapter.digest(),
            "codebook": self.start.digest,
            "data": content.hexdigest()[:16],
            "held back": len(self.held_out),
        }

    def try_to_save(self, path: Path) -> None:
        """`save`; a disk that is full takes away the checkpoint, and not the training."""
        try:
            self.save(path)
        except (OSError, RuntimeError) as error:  # the second is torch's own
            path.with_suffix(PART).unlink(missing_ok=True)
            log.warning("step %d has no checkpoint: %s", self.done, error)

    def save(self, path: Path) -> None:
        """Writes a checkpoint, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(PART)
        state = {
            "identity": self.identity,
            "done": self.done,
            "measured": self.measured,
            "model": self.model.state_dict(),
            "quantizers": self.quantizers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path | None) -> None:
        if path is None or not path.is_file():
            raise FileNotFoundError(f"resume: found no checkpoint {path}; start without it")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except Exception as error:
            raise TrainingFailed(f"resume: {path} cannot be read: {error}") from error
        wrong = [
            f"{name} {identity.get(name)} (checkpoint) and {value} (now)"
            for name, value in self.identity.items()
            if identity.get(name) != value
        ]
        if wrong:
            raise TrainingFailed(f"resume: {path} is of another run: {'; '.join(wrong)}")
        self.model.load_state_dict(state["model"])
        self.quantizers.load_state_dict(state["quantizers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.measured = state["done"], state["measured"]


def save_result(
    model: Any, codebook: Codebook, folder: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """Model, codebook and tokenizer in one folder, which `--model` and `--codebook` both accept.

    All files are written, or none; a checkpoint in the folder has done its work and goes.
    """
    with written_together(folder) as part:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        if codebook.coded:
            codebook.save_pretrained(part)
    (Path(folder) / CHECKPOINT).unlink(missing_ok=True)


def _check_model(model: nn.Module, codebook: Codebook, adapter: Adapter) -> None:
    if model.training:
        raise ValueError("model: expected evaluation mode, got training: call model.eval()")
    if adapter.dtype != torch.float32:
        raise ValueError(f"model: expected fp32 weights to train, got {adapter.dtype}")
    if not codebook.codec.trainable(codebook):
        raise ValueError(f"codebook: expected codes, or dense fp32, got dense {codebook.dtype}")
    codebook.check_model(adapter)
    check_weights(model)
    if any(isinstance(value, tuple) for value in model.state_dict().values()):
        raise ValueError("model: expected fp32 weights to train, got quantized ones")


def _check_windows(windows: list[Inputs], adapter: Adapter) -> int:
    """The tokens that every window has."""
    lengths = {adapter.count(window)[1] for window in windows}
    if len(lengths) > 1:
        raise ValueError(f"data: expected windows of one length, got {sorted(lengths)}")
    check_windows(adapter, windows, 2, "data")
    return lengths.pop()


def _check_labels(labels: Tensor | None, windows: int, model: Any) -> None:
    if labels is None:
        return
    classes = int(getattr(model.config, "num_labels", 0))
    if labels.shape != (windows,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 of shape ({windows},), one a window, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if is_language_model(model) or not hasattr(model, "classifier"):
        raise ValueError("labels: expected a model with a classifier")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {labels.unique().tolist()}")


def _apart(windows: int, held_back: int) -> set[int]:
    """Evenly spaced windows that are not trained on; at least half are trained on."""
    count = max(0, min(held_back, windows // 2))
    return {windows * (2 * i + 1) // (2 * count) for i in range(count)}
